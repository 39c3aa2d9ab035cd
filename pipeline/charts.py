"""Charts as inline SVG, drawn from numbers alone; colours are the page's CSS classes, so they follow its scheme.

Letters: n points of a series. Lengths are SVG user units, about a pixel each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, get_args

import numpy as np

Colour = Literal["a", "b", "c", "d", "e", "f", "g", "h"]
COLOURS: tuple[Colour, ...] = get_args(Colour)

MOST_POINTS = 1000
"""Points that a series is thinned to, so that a page of a long run stays small."""

_NEAR_ZERO = 0.5  # of the highest value: from below it a frame begins at zero, so that heights compare by eye

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 40  # room around the frame: tick labels on two sides, half a label on two


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Numbers to draw: x and y [n], as a cloud of points, a line, a dashed one, or one with a dot at each value."""

    x: np.ndarray
    y: np.ndarray
    name: str
    style: Literal["points", "line", "dashed", "dots"] = "line"
    colour: Colour = "a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart; `level` is a horizontal dashed line, and the frame holds zero where `from_zero` says so."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    size: tuple[int, int] = (320, 200)
    from_zero: bool = False
    level: float | None = None
    level_name: str = ""
    x_range: tuple[float, float] | None = None  # None: x counts steps, so ticks are whole numbers

    def svg(self) -> str:
        """The chart as one `<svg>` element; points above the frame are drawn on its upper edge."""
        frame = _Frame(self)
        drawn = [_draw(series, frame) for series in self.series]
        level = f'<path class="level" d="{frame.horizontal(self.level)}"/>' if frame.holds(self.level) else ""
        width, height = self.size
        return (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(self.described())}" '
            f'data-frame="{frame.told()}" data-x="{escape(self.x_label)}">'
            f"{frame.axes()}{level}{''.join(drawn)}</svg>"
        )

    def described(self) -> str:
        """The chart in words, for those who do not see it."""
        said = [f"{s.name} from {short(s.y[0])} to {short(s.y[-1])}" for s in self.series if len(s.y)]
        measure = f"{self.title}, {self.y_label}" if self.y_label else self.title
        return f"{measure} over {self.x_label}: {', '.join(said) or 'no values'}"

    def shows_level(self) -> bool:
        """Whether there is a level, and inside the frame."""
        return _Frame(self).holds(self.level)

    def above(self) -> int:
        """How many values lie above the frame."""
        top = _Frame(self).y[1]
        return sum(int(np.count_nonzero(series.y > top)) for series in self.series)


def figure(chart: Chart, kind: str = "") -> str:
    """A chart with its title, the key to its series where it has several, and what lies outside."""
    keys = [(f"{s.style} {s.colour}", s.name) for s in chart.series] if len(chart.series) > 1 else []
    keys += [("level", chart.level_name)] if chart.shows_level() else []
    legend = "".join(f'<span class="key {looks}"><i>{escape(name)}</i></span>' for looks, name in keys)
    above = chart.above()
    note = f"<p>{above} value{'s' if above != 1 else ''} above the frame</p>" if above else ""
    caption = f"<figcaption><b>{escape(chart.title)}</b><span>{legend}</span></figcaption>"
    return f'<figure class="{kind}">{caption}{chart.svg()}{note}</figure>\n'


class _Frame:
    """Where values fall on the paper."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        xs = np.concatenate([series.x for series in chart.series])
        ys = np.concatenate([_without_outliers(s.y) if s.style == "points" else s.y for s in chart.series])
        self.x = chart.x_range or _range(xs, pad=0.0, least=1.0)
        low, high = _range(ys, pad=0.06)
        if 0 <= float(ys.min()) < _NEAR_ZERO * high:
            low = 0.0
        if chart.level is not None and chart.level <= 2 * high:  # a level far away would flatten the curve
            high = max(high, 1.06 * chart.level)
        self.y = (0.0, high) if chart.from_zero else (low, high)
        self.right, self.bottom = chart.size[0] - _RIGHT, chart.size[1] - _BOTTOM

    def place(self, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
        """Values [n] to points on the paper; what lies outside comes to the edge."""
        across = np.clip((x - self.x[0]) / (self.x[1] - self.x[0]), 0, 1)
        up = np.clip((y - self.y[0]) / (self.y[1] - self.y[0]), 0, 1)
        left, down = _LEFT + across * (self.right - _LEFT), self.bottom - up * (self.bottom - _TOP)
        return [(float(a), float(b)) for a, b in zip(left, down, strict=True)]

    def holds(self, level: float | None) -> bool:
        """Whether a level is inside the frame."""
        return level is not None and self.y[0] <= level <= self.y[1]

    def horizontal(self, level: float | None) -> str:
        """The path of a line across the frame."""
        ((_, y),) = self.place(np.array([self.x[0]]), np.array([level], float))
        return f"M{_LEFT} {y:.1f}H{self.right}"

    def told(self) -> str:
        """The ranges and the edges, for the script that reads values back off the paper."""
        edges = (_LEFT, self.right, _TOP, self.bottom)
        return " ".join(f"{value:.10g}" for value in (*self.x, *self.y, *edges))

    def axes(self) -> str:
        """Grid, tick labels and axis labels."""
        parts = []
        for value in ticks(*self.y, 5):
            ((_, y),) = self.place(np.array([self.x[0]]), np.array([value]))
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{self.right}"/>')
            parts.append(f'<text class="tick y" x="{_LEFT - 7}" y="{y + 3.5:.1f}">{short(value)}</text>')
        whole = 1.0 if self.chart.x_range is None else 0.0
        for value in ticks(*self.x, max(2, (self.right - _LEFT) // 80), whole):
            ((x, _),) = self.place(np.array([value]), np.array([self.y[0]]))
            parts.append(f'<path class="grid" d="M{x:.1f} {self.bottom}v4"/>')
            parts.append(f'<text class="tick x" x="{x:.1f}" y="{self.bottom + 16}">{short(value)}</text>')
        middle, height = (_LEFT + self.right) / 2, (_TOP + self.bottom) / 2
        label_x, label_y = escape(self.chart.x_label), escape(self.chart.y_label)
        parts.append(f'<path class="axis" d="M{_LEFT} {self.bottom}H{self.right}"/>')
        parts.append(f'<text class="label" x="{middle:.0f}" y="{self.chart.size[1] - 6}">{label_x}</text>')
        turned = f'transform="rotate(-90 11 {height:.0f})"'
        parts.append(f'<text class="label" x="11" y="{height:.0f}" {turned}>{label_y}</text>' if label_y else "")
        return "".join(parts)


def _draw(series: Series, frame: _Frame) -> str:
    x, y = thin(series.x, series.y)
    points = frame.place(x, y)
    if not points:
        return ""
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in points)  # no length, round ends: one path draws them all
    name = f'data-name="{escape(series.name)}"'
    if series.style == "points" or len(points) == 1:
        # A few faint points would be overlooked, one even more so.
        kind = "dots" if len(points) == 1 else "points few" if len(points) < 100 else "points"
        return f'<path class="{kind} {series.colour}" {name} d="{dots}"/>'
    line = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    marks = f'<path class="dots {series.colour}" d="{dots}"/>' if series.style == "dots" else ""
    kind = "line dashed" if series.style == "dashed" else "line"
    return f'<path class="{kind} {series.colour}" {name} d="M{line}"/>{marks}'


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` of the n points, evenly spaced, first and last among them."""
    if len(x) <= most:
        return x, y
    kept = np.linspace(0, len(x) - 1, most).round().astype(int)
    return x[kept], y[kept]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` nearest values, fewer at both ends: [n] -> [n], without lag."""
    sums, at = np.concatenate([[0.0], np.cumsum(y, dtype=float)]), np.arange(len(y))
    first, after = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(y))
    return (sums[after] - sums[first]) / (after - first)


def binned(x: np.ndarray, y: np.ndarray, edges: np.ndarray, least: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Mean of y in each bin of x that holds `least` values -> mean x and mean y of those bins."""
    which = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    held = np.flatnonzero(np.bincount(which, minlength=len(edges) - 1) >= least)
    mean_x, mean_y = (np.array([values[which == one].mean() for one in held]) for values in (x, y))
    return mean_x, mean_y


def ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Round values inside [low, high], about `count` of them, at least `least` and 1, 2 or 5 powers of ten apart."""
    rough = max((high - low) / max(count, 1), least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def short(value: float) -> str:
    """A number as a tick label: 0.25, 1,000, 1e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    if not exponent and abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _without_outliers(values: np.ndarray) -> np.ndarray:
    """The values less a few that are far above all others: one slow first step must not flatten the rest."""
    if len(values) < 10:
        return values
    usual = float(np.quantile(values, 0.97))
    return values[values <= usual] if values.max() > 3 * usual > 0 else values


def _range(values: np.ndarray, pad: float, least: float = 0.0) -> tuple[float, float]:
    """Lowest and highest value with room on both sides; never empty."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = least or abs(high) / 2 or 0.5
        return low - around, high + around
    return low - pad * (high - low), high + pad * (high - low)
