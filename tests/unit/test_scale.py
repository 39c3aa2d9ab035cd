"""The store of a million pictures on paper: the farm that is played, and that its page shows what the script prints."""

from pathlib import Path

import pytest
from bench import simulate_scale as scale

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")


def test_one_encoder_is_ideal_and_looks_once() -> None:
    played = scale.play([range(50)], [1.0], 0.0, [float("inf")])
    assert played == scale.Played(seconds=1.0, ended=1.0, doubled=0.0, looks=1.0, missing=0)


def test_two_that_go_side_by_side_make_everything_twice() -> None:
    played = scale.play([range(50), range(50)], [1.0, 1.0], 0.0, [float("inf")] * 2)
    assert (played.doubled, played.seconds) == (1.0, 2.0)


def test_a_killed_shard_leaves_what_it_had_not_made() -> None:
    played = scale.play([range(10), range(10, 20)], [1.0, 1.0], 0.0, [float("inf"), 4.5])
    assert played.missing == 6


def test_own_orders_double_little_and_shards_nothing() -> None:
    start, order, shards = (scale.farm(policy, 1600, 16, 0.0001, 0) for policy in scale.POLICIES)
    assert start.doubled > 0.5
    assert order.doubled < 0.1
    assert shards.doubled == 0
    assert order.seconds < 1.2 < start.seconds
    assert scale.farm("own order", 1600, 16, 0.0001, 4).missing == 0 < scale.farm("shards", 1600, 16, 0.0001, 4).missing


@pytest.mark.parametrize(("what", "much"), list(scale.arithmetic(1_000_000, 64, scale.Assumed())))
def test_the_page_shows_what_the_script_prints(what: str, much: str) -> None:
    assert f"| {what} | {much} |" in PAGE
