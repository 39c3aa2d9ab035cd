"""A run as one HTML page that needs nothing else: the verdict, the curves, the previews, the config.

Only what lies in the run folder is read: neither model nor store, so that a page can be made anywhere.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path

import numpy as np

from flux2_relay.pipeline import charts, held_out
from flux2_relay.pipeline.charts import Chart, Series, short
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.page import page
from flux2_relay.pipeline.report_previews import previews
from flux2_relay.pipeline.run_folder import RunFolder

_NUMBERS = ("step", "loss", "lr", "grad_norm", "seconds", "wait_seconds", "peak_bytes")
_LOG_LINES = 200


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


def write_report(run: RunFolder, config: Config) -> Path:
    """Write RUN/report.html, whole or not at all -> its path."""
    metrics = read_metrics(run)
    parts = [
        f'<p class="kind">flux2-relay run</p>\n<h1>{escape(config.run.name)}</h1>',
        _verdict(run, config, metrics),
        _facts(run, metrics),
        _curves(run, config, metrics),
        previews(run, config),
        _about(run, config),
    ]
    target = run.path / "report.html"
    aside = target.with_suffix(".part")
    aside.write_text(page(f"{config.run.name}: flux2-relay run", "\n".join(parts)), "utf-8")
    os.replace(aside, target)
    return target


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


def _verdict(run: RunFolder, config: Config, metrics: Metrics) -> str:
    """What came of the run, in one line."""
    done, steps = metrics.done, config.train.steps
    finished = done >= steps and run.adapter.exists()
    said = [f"{done:,} of {steps:,} steps done"]
    if done:
        first, last = (short(float(f"{end:.4g}")) for end in metrics.ends())
        said.append(f"loss {first} → {last}, first to last fifth of the steps" if done > 1 else f"loss {first}")
    if (held := held_out.read(run)) is not None:
        said.append(held_out.in_words(held))
    if run.adapter.exists():
        said.append(f"adapter <code>{escape(str(run.adapter))}</code>")
    if not finished:
        said.append(f"not finished: the same <code>relay train</code> goes on from step {_newest_checkpoint(run):,}")
    return f'<p class="verdict{"" if finished else " open"}">{"; ".join(said)}</p>'


def _newest_checkpoint(run: RunFolder) -> int:
    return max((int(path.name) for path in (run.path / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def _facts(run: RunFolder, metrics: Metrics) -> str:
    """The figures that one looks for first."""
    if not metrics.done:
        return ""
    first, last = metrics.ends()
    busy, waited = float(metrics.seconds.sum()), float(metrics.wait_seconds.sum())
    facts = [
        ("Loss", f"{last:.3g}", f"{last / first - 1:+.0%} since the first fifth" if len(metrics.loss) > 4 else "mean"),
        ("Seconds a step", f"{np.median(metrics.seconds):.3g}", "median"),
        ("Waiting for data", f"{waited / (busy + waited or 1):.1%}", f"{_duration(waited)} in all"),
        ("Time in steps", _duration(busy + waited), "previews and checkpoints not counted"),
        ("Peak memory", in_bytes(metrics.peak_bytes.max()), "arrays held by MLX at once"),
    ]
    if run.adapter.exists():
        facts.append(("Adapter", in_bytes(run.adapter.stat().st_size), "in diffusers names"))
    cells = (f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in facts)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _curves(run: RunFolder, config: Config, metrics: Metrics) -> str:
    """Every chart of the run."""
    if not metrics.done:
        return '<h2>Curves</h2>\n<p class="hint">No step has been done yet.</p>'
    figures = [_figure(_loss(metrics), "wide"), _figure(_loss_by_sigma(metrics), "tall")]
    if (held := held_out.read(run)) is not None:
        figures += [_figure(held_out.curve(held), "wide"), _figure(held_out.by_sigma(held), "tall")]
    figures += [_figure(chart) for chart in _small_charts(config, metrics)]
    thinned = len(metrics.step) > charts.MOST_POINTS
    note = f'<p class="hint">Of {len(metrics.step):,} steps {charts.MOST_POINTS:,} are drawn.</p>' if thinned else ""
    return f'<h2>Curves</h2>\n{note}<div class="charts">\n{"".join(figures)}</div>'


def _figure(chart: Chart, kind: str = "") -> str:
    keys = [(f"{s.style} {s.colour}", s.name) for s in chart.series] if len(chart.series) > 1 else []
    keys += [("level", chart.level_name)] if chart.shows_level() else []
    legend = "".join(f'<span class="key {looks}"><i>{escape(name)}</i></span>' for looks, name in keys)
    above = chart.above()
    note = f"<p>{above} value{'s' if above != 1 else ''} above the frame</p>" if above else ""
    caption = f"<figcaption><b>{escape(chart.title)}</b><span>{legend}</span></figcaption>"
    return f'<figure class="{kind}">{caption}{chart.svg()}{note}</figure>\n'


def _loss(metrics: Metrics) -> Chart:
    return Chart(
        title="Loss",
        x_label="step",
        y_label="loss",
        series=_with_trend(metrics.step, metrics.loss, "a step"),
        size=(740, 300),
    )


def _loss_by_sigma(metrics: Metrics) -> Chart:
    """A single loss says little without its noise level; the halves show what training changed at each."""
    half = len(metrics.loss) // 2
    series = [Series(x=metrics.sigma, y=metrics.loss, name="a step", style="points")]
    if len(metrics.loss) >= 16:
        edges = np.linspace(0, 1, 11 if len(metrics.loss) >= 100 else 6)
        first = charts.binned(metrics.sigma[:half], metrics.loss[:half], edges)
        second = charts.binned(metrics.sigma[half:], metrics.loss[half:], edges)
        series.append(Series(x=first[0], y=first[1], name="first half", style="dots", colour="b"))
        series.append(Series(x=second[0], y=second[1], name="second half", style="dots"))
    return Chart(
        title="Loss by sigma",
        x_label="sigma (0 data, 1 noise; mean of a step's items)",
        y_label="loss",
        series=series,
        size=(370, 309),
        x_range=(0.0, 1.0),
    )


def _small_charts(config: Config, metrics: Metrics) -> list[Chart]:
    step, clip = metrics.step, config.train.clip
    wait = Series(x=step, y=metrics.wait_seconds, name="wait", colour="b")
    memory, unit = _scaled_bytes(metrics.peak_bytes)
    return [
        Chart(
            title="Gradient norm",
            x_label="step",
            y_label="before clipping",
            series=_with_trend(step, metrics.grad_norm, "a step"),
            from_zero=True,
            level=clip or None,
            level_name=f"clipped to {short(clip)}" if clip else "",
        ),
        Chart(
            title="Time",
            x_label="step",
            y_label="seconds",
            series=[Series(x=step, y=metrics.seconds, name="a step", style="points"), wait],
            from_zero=True,
        ),
        Chart(
            title="Learning rate",
            x_label="step",
            y_label="learning rate",
            series=[Series(x=step, y=metrics.lr, name="learning rate")],
            from_zero=True,
        ),
        Chart(
            title="Peak memory",
            x_label="step",
            y_label=f"{unit} so far",
            series=[Series(x=step, y=memory, name="peak memory")],
            from_zero=True,
        ),
    ]


def _with_trend(x: np.ndarray, y: np.ndarray, name: str) -> list[Series]:
    """Values as faint points, and their mean over about a fifteenth of the run."""
    window = max(3, len(y) // 15)
    trend = Series(x=x, y=charts.smooth(y, window), name=f"mean of {window:,}")
    return [Series(x=x, y=y, name=name, style="points"), *([trend] if len(y) >= 3 else [])]


def _about(run: RunFolder, config: Config) -> str:
    """Where the run came from, and its config and log, folded."""
    told = adapter_metadata(run.adapter)
    rows = {
        "Run folder": str(run.path),
        "Model": config.model.path,
        "Store": config.cache.path,
        "Set": _set_key(run) or told.get("flux2_relay.set", "unknown until the first checkpoint"),
        "Trained with": f"flux2-relay {told['flux2_relay.version']}" if "flux2_relay.version" in told else "",
        "Page by": f"flux2-relay {version('flux2-relay')}",
    }
    cells = "".join(
        f"<tr><th>{name}</th><td><code>{escape(value)}</code></td></tr>" for name, value in rows.items() if value
    )
    folded = _folded("Config", run.path / "config.yaml") + _folded("Log", run.path / "log.txt", _LOG_LINES)
    return f'<h2>About this run</h2>\n<table class="about">{cells}</table>\n{folded}'


def _folded(title: str, path: Path, last: int | None = None) -> str:
    if not path.exists():
        return ""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    text = "\n".join(lines if last is None else lines[-last:])
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>\n"


def _set_key(run: RunFolder) -> str | None:
    """The key of the set in the store that the newest checkpoint was trained on."""
    try:
        state = (run.path / "checkpoints" / f"{_newest_checkpoint(run):06d}" / "state.json").read_text("utf-8")
        return str(json.loads(state)["set"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def adapter_metadata(path: Path) -> Mapping[str, str]:
    """What an adapter file says of itself; nothing where there is none or it cannot be read."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        return {str(name): str(value) for name, value in header["__metadata__"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}


def _scaled_bytes(values: np.ndarray) -> tuple[np.ndarray, str]:
    most = float(values.max())
    size, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB")) if most >= s), (1e3, "kB"))
    return values / size, unit


def in_bytes(size: float) -> str:
    """Bytes as people read them: 24.1 GB."""
    (value,), unit = _scaled_bytes(np.array([float(size)]))
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
