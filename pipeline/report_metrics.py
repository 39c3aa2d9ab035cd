"""The lines of a run's metrics as columns, and the words and units that a report says them in."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flux2_relay.pipeline.run_folder import RunFolder

_NUMBERS = ("step", "loss", "lr", "grad_norm", "seconds", "wait_seconds", "peak_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """The lines of metrics as columns [n] float64; sigma is the mean over a step's items."""

    step: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    grad_norm: np.ndarray
    seconds: np.ndarray
    wait_seconds: np.ndarray
    peak_bytes: np.ndarray
    sigma: np.ndarray

    @property
    def done(self) -> int:
        """Updates done."""
        return int(self.step[-1]) if len(self.step) else 0

    def ends(self) -> tuple[float, float]:
        """Mean loss of the first and of the last fifth of the steps."""
        fifth = max(1, len(self.loss) // 5)
        return float(self.loss[:fifth].mean()), float(self.loss[-fifth:].mean())


def read_metrics(run: RunFolder) -> Metrics:
    """The run's metrics; a line that lacks a number is left out."""
    rows = [row for row in map(_row, run.lines()) if row is not None]
    columns = np.array(rows, float).reshape(-1, len(_NUMBERS) + 1).T
    return Metrics(**dict(zip((*_NUMBERS, "sigma"), columns, strict=True)))


def _row(line: Mapping[str, object]) -> list[float] | None:
    sigma = line.get("sigma")
    mean = float(np.mean(sigma)) if isinstance(sigma, list) and sigma else sigma
    values = [*(line.get(name) for name in _NUMBERS), mean]
    return [float(v) for v in values] if all(isinstance(v, int | float) and np.isfinite(v) for v in values) else None


def scaled_bytes(values: np.ndarray) -> tuple[float, str]:
    """The unit that suits the largest of these: its bytes and its name."""
    most = float(values.max())
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB")) if most >= size), (1e3, "kB"))


def in_bytes(size: float) -> str:
    """Bytes as people read them: 24.1 GB."""
    if size < 1000:
        return f"{size:.0f} B"
    divisor, unit = scaled_bytes(np.array([float(size)]))
    value = size / divisor
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def duration(seconds: float) -> str:
    """A time as people say it: 4.20 s, 31 s, 12 min 05 s, 3 h 07 min."""
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
