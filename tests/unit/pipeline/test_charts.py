"""Charts: round ticks, faithful curves, frames that hold what matters."""

import re
from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pytest

from flux2_relay.pipeline import charts


@pytest.mark.parametrize(
    ("low", "high", "count", "least", "expected"),
    [
        (0, 1, 5, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 0.92, 5, 0, [0.4, 0.6, 0.8]),
        (0, 1e-4, 4, 0, [0, 5e-5, 1e-4]),
        (1, 3, 8, 1, [1, 2, 3]),
        (-30, 250, 5, 0, [0, 100, 200]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, least: float, expected: list[float]) -> None:
    assert charts.ticks(low, high, count, least) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (0.25, "0.25"), (1500, "1,500"), (1e-4, "1e-4"), (1.5e-3, "1.5e-3"), (-2, "-2")]
)
def test_tick_labels(value: float, said: str) -> None:
    assert charts.short(value) == said


def test_smoothing_is_a_mean_of_the_nearest() -> None:
    assert charts.smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert charts.smooth(np.full(50, 2.0), 7).tolist() == [2.0] * 50


def test_bins_skip_what_holds_too_little() -> None:
    x, y = np.array([0.1, 0.3, 0.3, 1.0]), np.array([1.0, 2.0, 4.0, 8.0])
    every, some = (charts.binned(x, y, np.linspace(0, 1, 5), least) for least in (1, 2))
    assert [part.tolist() for part in every] == [[0.1, 0.3, 1.0], [1.0, 3.0, 8.0]]
    assert [part.tolist() for part in some] == [[0.3], [3.0]]


def chart(y: Sequence[float], style: Literal["points", "line", "dots"] = "points", **others) -> charts.Chart:
    x = np.arange(1.0, len(y) + 1)
    series = [charts.Series(x=x, y=np.array(y), name="values", style=style)]
    return charts.Chart(title="T", x_label="step", y_label="y", series=series, **others)


def test_a_chart_is_sound_xml_inside_its_size() -> None:
    root = ElementTree.fromstring(chart([1.0, 5.0, 2.0], "dots", level=3.0, size=(300, 200)).svg())
    numbers = [float(n) for path in root.iter("path") for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
    assert all(0 <= number <= 300 for number in numbers)
    assert [path for path in root.iter("path") if path.attrib["class"] == "level"]


def test_a_level_far_above_the_values_is_left_out() -> None:
    near, far = (chart([1.0, 5.0, 2.0], level=level) for level in (9.0, 99.0))
    assert (near.shows_level(), far.shows_level()) == (True, False)
    assert ('class="level"' in near.svg(), 'class="level"' in far.svg()) == (True, False)


def test_higher_values_are_drawn_higher() -> None:
    (drawn,) = re.findall(r'class="line a" [^>]*d="M([^"]*)"', chart([1.0, 3.0, 2.0], "line").svg())
    (_, low), (_, high), (_, middle) = ([float(n) for n in point.split()] for point in drawn.split("L"))
    assert high < middle < low


def test_one_slow_step_does_not_flatten_the_rest() -> None:
    usual = [2.0 + step % 3 * 0.1 for step in range(100)]
    slow = chart([60.0, *usual], from_zero=True)
    assert slow.above() == 1
    assert "aria-label" in slow.svg()
    assert chart(usual, from_zero=True).above() == 0
