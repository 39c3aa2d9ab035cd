"""The pictures that the score is about, each set drawn once; at the end a table, and `runs/score.json`."""

from pathlib import Path

import pytest
from score import lesson, scores
from score.prompts import MODEL, captions
from score.studio import Studio

HERE = Path(__file__).parent
BOARD = pytest.StashKey[scores.Board]()


def pytest_configure(config: pytest.Config) -> None:
    """An empty board for this session."""
    config.stash[BOARD] = scores.Board()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder carries the marker."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.score)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured and keep it."""
    board = config.stash[BOARD]
    if board.rows or board.facts:
        terminalreporter.section("score")
        for line in board.lines():
            terminalreporter.write_line(line)
        board.write()


@pytest.fixture(scope="session")
def board(pytestconfig: pytest.Config) -> scores.Board:
    """Where figures are put."""
    return pytestconfig.stash[BOARD]


@pytest.fixture(scope="session")
def base(board: scores.Board) -> scores.Score:
    """The base on the fifty captions."""
    board.rows["base"] = scores.score(Studio(model=MODEL).draw_on_two_cores(captions()))
    return board.rows["base"]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> lesson.Lesson:
    """The demo's own run."""
    return lesson.demo() or lesson.make(tmp_path_factory.mktemp("lesson"))[0]


@pytest.fixture(scope="session")
def learned(board: scores.Board, base: scores.Score, good: lesson.Lesson) -> scores.Score:
    """The demo's adapter on the fifty captions, with the trigger; a row without it, too."""
    board.rows["the demo's LoRA, with the trigger"] = found = scores.score(good.draw(), base.ink)
    board.rows["the demo's LoRA, without it"] = scores.score(good.draw(trigger=""), base.ink)
    return found
