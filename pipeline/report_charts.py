"""Every chart of one run: loss in three views, held-out loss, learning rate, gradient, time, waits, memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flux2_relay.pipeline import charts, held_out
from flux2_relay.pipeline.charts import Chart, Series, figure, short
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.held_out import HeldOut
from flux2_relay.pipeline.report_metrics import Metrics, scaled_bytes

_BANDS = 3


def curves(config: Config, metrics: Metrics, held: HeldOut | None, origin: Mapping[str, Any]) -> str:
    """The section with all of them."""
    if not metrics.done:
        return '<h2>Curves</h2>\n<p class="hint">No step has been done yet.</p>'
    figures = [figure(loss(metrics), "wide"), figure(_loss_by_sigma(metrics), "tall")]
    if held is not None:
        figures += [figure(held_out.curve(held), "wide"), figure(held_out.by_sigma(held), "tall")]
    figures += [figure(chart) for chart in _small_charts(config, metrics, origin)]
    thinned = len(metrics.step) > charts.MOST_POINTS
    note = f'<p class="hint">Of {len(metrics.step):,} steps {charts.MOST_POINTS:,} are drawn.</p>' if thinned else ""
    return f'<h2>Curves</h2>\n{note}<div class="charts">\n{"".join(figures)}</div>'


def loss(metrics: Metrics) -> Chart:
    """The loss of each step, and smoothed."""
    return Chart(
        title="Loss",
        x_label="step",
        y_label="loss",
        series=_with_trend(metrics.step, metrics.loss, "a step"),
        size=(740, 300),
    )


def window(count: int) -> int:
    """Steps that a trend is the mean of: about a fifteenth of the run."""
    return max(3, count // 15)


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


def _bands(metrics: Metrics) -> Chart:
    """The trend of each third of the steps by noise level: a mixed curve hides which of them still falls."""
    order = np.argsort(metrics.sigma, kind="stable")
    series = []
    for chosen, colour in zip(np.array_split(order, _BANDS), charts.COLOURS, strict=False):
        steps = np.sort(chosen)
        if len(steps):
            low, high = (short(float(f"{edge:.2g}")) for edge in (metrics.sigma[chosen[0]], metrics.sigma[chosen[-1]]))
            trend = charts.smooth(metrics.loss[steps], window(len(steps)))
            series.append(Series(x=metrics.step[steps], y=trend, name=f"sigma {low} to {high}", colour=colour))
    return Chart(title="Loss by sigma band", x_label="step", y_label="smoothed loss", series=series)


def _small_charts(config: Config, metrics: Metrics, origin: Mapping[str, Any]) -> list[Chart]:
    step, clip = metrics.step, config.train.clip
    return [
        _bands(metrics),
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
            title="Learning rate",
            x_label="step",
            y_label="",
            series=[Series(x=step, y=metrics.lr, name="learning rate")],
            from_zero=True,
        ),
        Chart(
            title="Time",
            x_label="step",
            y_label="seconds",
            series=_with_trend(step, metrics.seconds, "a step"),
            from_zero=True,
        ),
        _waits(metrics),
        _memory(metrics, origin),
    ]


def _waits(metrics: Metrics) -> Chart:
    """What steps waited for the store: nothing to speak of, unless the disk or the network is slow."""
    factor, unit = (1, "seconds") if metrics.wait_seconds.max() >= 0.5 else (1000, "milliseconds")
    series = _with_trend(metrics.step, metrics.wait_seconds * factor, "before a step")
    return Chart(title="Waiting for data", x_label="step", y_label=unit, series=series, from_zero=True)


def _memory(metrics: Metrics, origin: Mapping[str, Any]) -> Chart:
    """The most bytes of arrays at once so far, beside what was planned."""
    planned = planned_bytes(origin)
    every = metrics.peak_bytes if planned is None else np.append(metrics.peak_bytes, planned)
    size, unit = scaled_bytes(every)
    series = [Series(x=metrics.step, y=metrics.peak_bytes / size, name="measured")]
    if planned is not None:
        ends = metrics.step[[0, -1]] if len(metrics.step) > 1 else metrics.step
        series.append(Series(x=ends, y=np.full(len(ends), planned / size), name="planned", style="dashed", colour="b"))
    return Chart(title="Peak memory", x_label="step", y_label=f"{unit} so far", series=series, from_zero=True)


def planned_bytes(origin: Mapping[str, Any]) -> float | None:
    """The peak that the plan predicted, where the run's folder says it."""
    plan = origin.get("plan")
    planned = plan.get("peak_bytes") if isinstance(plan, Mapping) else None
    return float(planned) if isinstance(planned, int | float) and planned > 0 else None


def _with_trend(x: np.ndarray, y: np.ndarray, name: str) -> list[Series]:
    """Values as faint points, and their mean over about a fifteenth of the run."""
    wide = window(len(y))
    trend = Series(x=x, y=charts.smooth(y, wide), name=f"mean of {wide:,}")
    return [Series(x=x, y=y, name=name, style="points"), *([trend] if len(y) >= 3 else [])]
