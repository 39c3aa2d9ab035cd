"""Does the miniature draw what captions say, does the demo's adapter learn its lesson, and can this test fail?"""

from pathlib import Path

import pytest
from score import bounds, lesson, scores
from score.faults import FAULTS

IN_SCORE = "latents_not_normalised"
"""The fault that `make score` has time for; `make torture` plants them all."""


def test_the_base_follows_captions(base: scores.Score) -> None:
    assert base.follows >= bounds.FOLLOWS


def test_the_lesson_moves_the_style(learned: scores.Score) -> None:
    assert learned.style is not None
    assert learned.style >= bounds.STYLE


def test_content_still_follows(learned: scores.Score) -> None:
    assert learned.follows >= bounds.CONTENT


def test_the_loss_falls(board: scores.Board, good: lesson.Lesson) -> None:
    first, last = good.loss()
    board.facts["loss, last fifth over first"] = last / first
    assert last / first <= bounds.FALLS_TO


def test_check_says_yes(board: scores.Board, good: lesson.Lesson) -> None:
    board.facts["relay check"] = verdict = good.check()
    assert verdict == "yes"


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=() if name == IN_SCORE else pytest.mark.torture) for name in FAULTS if name != "none"],
)
def test_a_planted_fault_shows(fault: str, board: scores.Board, base: scores.Score, tmp_path: Path) -> None:
    run, peaks = lesson.make(tmp_path, fault)
    board.rows[fault.replace("_", " ")] = found = scores.score(run.draw(), base.ink)
    for stage, peak in peaks.items():
        board.facts[f"peak of {stage}, MB"] = peak / 1e6
    assert not found.is_good
    assert max(peaks.values()) <= bounds.PEAK_BYTES
