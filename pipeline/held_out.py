"""What a report says of the held-out loss: its curve, the checkpoint that is marked as the best, and both by sigma."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flux2_relay.pipeline.charts import Chart, Series
from flux2_relay.pipeline.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The lines of validation as columns [n] float64, the first that of the untrained adapter."""

    step: np.ndarray
    loss: np.ndarray
    sigma: np.ndarray  # [s] the levels it is taken at
    by_sigma: np.ndarray  # [n, s]
    pictures: int
    best: int | None  # the step of the checkpoint that is marked as the best, if it is there

    def at(self, step: int) -> float:
        """The loss after a step that has a line."""
        return float(self.loss[np.flatnonzero(self.step == step)[-1]])


def read(run: RunFolder) -> HeldOut | None:
    """The run's held-out losses; a line that lacks a number is left out, None where none is whole."""
    lines = [line for line in run.validations() if _is_whole(line)]
    if not lines:
        return None
    sigma = lines[-1]["sigma"]
    lines = [line for line in lines if line["sigma"] == sigma]
    step = np.array([line["step"] for line in lines], float)
    best = _best(run)
    return HeldOut(
        step=step,
        loss=np.array([line["loss"] for line in lines], float),
        sigma=np.array(sigma, float),
        by_sigma=np.array([line["loss_by_sigma"] for line in lines], float),
        pictures=int(lines[-1]["pictures"]),
        best=best if best in step else None,
    )


def _is_whole(line: Mapping[str, object]) -> bool:
    sigma, by_sigma = line.get("sigma"), line.get("loss_by_sigma")
    if not isinstance(sigma, list) or not isinstance(by_sigma, list):
        return False
    numbers = [line.get("step"), line.get("loss"), line.get("pictures"), *sigma, *by_sigma]
    is_finite = all(isinstance(number, int | float) and np.isfinite(number) for number in numbers)
    return is_finite and len(sigma) == len(by_sigma) > 0


def _best(run: RunFolder) -> int | None:
    try:
        name = (run.checkpoints / "best").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return int(name) if name.isdigit() and (run.checkpoints / name).is_dir() else None


def curve(held_out: HeldOut) -> Chart:
    """The held-out loss over the steps, and the mark of the best checkpoint."""
    count = held_out.pictures
    name = f"mean over {count} picture{'' if count == 1 else 's'} at {len(held_out.sigma)} sigmas"
    series = [Series(x=held_out.step, y=held_out.loss, name=name, style="dots")]
    if held_out.best is not None:
        at = np.array([held_out.best], float)
        loss = np.array([held_out.at(held_out.best)])
        series.append(Series(x=at, y=loss, name=f"best checkpoint, step {held_out.best:,}", style="dots", colour="b"))
    return Chart(title="Held-out loss", x_label="step", y_label="loss", series=series, size=(740, 300))


def by_sigma(held_out: HeldOut) -> Chart:
    """What training changed at each noise level: before it, and at the best checkpoint or the last line."""
    later = held_out.best if held_out.best is not None else int(held_out.step[-1])
    row = int(np.flatnonzero(held_out.step == later)[-1])
    first = f"step {int(held_out.step[0]):,}"
    series = [Series(x=held_out.sigma, y=held_out.by_sigma[0], name=first, style="dots", colour="b")]
    if row:
        series.append(Series(x=held_out.sigma, y=held_out.by_sigma[row], name=f"step {later:,}", style="dots"))
    return Chart(
        title="Held-out loss by sigma",
        x_label="sigma (0 data, 1 noise)",
        y_label="loss",
        series=series,
        size=(370, 309),
        x_range=(0.0, 1.0),
    )


def in_words(held_out: HeldOut) -> str:
    """For the verdict: where it began, and where it is best."""
    first = f"held-out loss {held_out.loss[0]:.4g}"
    if held_out.best is not None:
        return f"{first} → {held_out.at(held_out.best):.4g} at its best, step {held_out.best:,}"
    return f"{first} → {held_out.loss[-1]:.4g}" if len(held_out.loss) > 1 else first
