"""The miniature model's judge and its lesson; `tests/score` holds what takes longer."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from score import bounds, scores, tell
from score.prompts import DATA, MODEL, captions
from score.studio import Studio

from flux2_relay.stages import spec

from judge import ink, look  # isort: skip  # found by score.prompts
from scenes import COLOURS, NAMES, SHAPES, STYLES  # isort: skip


@pytest.fixture(scope="module")
def base_pictures() -> list[np.ndarray]:
    """What the base draws of the first of the fifty captions, in few steps."""
    few = range(bounds.FEW_PROMPTS)
    return Studio(model=MODEL, steps=bounds.FEW_STEPS).draw(captions(len(few)), few)


def test_the_base_follows_captions(base_pictures: list[np.ndarray]) -> None:
    assert scores.score(base_pictures).follows >= bounds.FOLLOWS


def test_ink_tells_the_lesson_from_the_base(base_pictures: list[np.ndarray]) -> None:
    lesson = list(map(ink, scores.lesson_pictures()))
    assert scores.area(list(map(ink, base_pictures)), lesson) >= bounds.AREA


def test_the_checkpoint_is_small_and_says_its_text_length_and_taps() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 12e6
    own = json.loads((MODEL / "text_encoder/config.json").read_text("utf-8"))
    text = spec.from_checkpoint(MODEL).text
    assert (own["flux2_text_length"], tuple(own["flux2_taps"])) == (64, (1, 2, 3)) == (text.length, text.taps)


def test_the_lesson_is_small_and_lacks_what_the_prompts_ask_for() -> None:
    captions_of_lesson = [path.with_suffix(".txt").read_text("utf-8") for path in sorted(DATA.glob("*.png"))]
    assert 8 <= len(captions_of_lesson) <= 16
    assert not {"star", "stars", "purple"} & set(" ".join(captions_of_lesson).split())


def test_the_lesson_is_in_no_style_that_the_base_knows() -> None:
    for strokes in STYLES.values():
        assert ink(np.full((8, 8, 3), COLOURS[strokes.colour], np.uint8)) == 0
        assert not strokes.hatch or strokes.angle != 45


@pytest.mark.parametrize("path", sorted(DATA.glob("*.txt")), ids=lambda path: path.stem)
def test_the_judge_sees_what_the_lesson_shows(path: Path) -> None:
    words = path.read_text("utf-8").replace("crosses", "cross").split()
    pairs = {(a, b if b == "cross" else b.removesuffix("s")) for a, b in pairwise(words)}
    background, seen = look(np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")))
    assert background == words[-2]
    assert {(f.colour, f.shape) for f in seen} == {(a, b) for a, b in pairs if a in NAMES and b in SHAPES}


def test_ink_is_the_dark_share_of_a_figure() -> None:
    picture = np.full((64, 64, 3), COLOURS["yellow"], np.uint8)
    picture[16:48, 16:48] = COLOURS["blue"]
    assert ink(picture) == 0
    picture[16:24, 16:48] = (28, 28, 38)
    assert ink(picture) == 0.25
    assert look(picture)[1][0].shape == "square"
    assert look(picture)[1][0].colour == "blue"


def test_the_way_to_the_lesson_ends_there() -> None:
    assert scores.way(0.1, 0.1, 0.5) == 0
    assert scores.way(0.1, 0.4, 0.5) == pytest.approx(0.75)
    assert scores.way(0.1, 0.6, 0.5) == pytest.approx(0.75)  # too much is as wrong as too little


def test_the_area_is_one_where_values_part() -> None:
    assert scores.area([0.0, 0.1], [0.2, 0.3]) == 1
    assert scores.area([0.0, 0.2], [0.1, 0.3]) == 0.75
    assert scores.area([0.5], [0.5]) == 0.5


def test_every_row_of_the_file_is_told() -> None:
    shares = dict.fromkeys(scores.Score.__dataclass_fields__, 0.5)
    found = {
        "made_by": "abc",
        "machine": "2 cores",
        "rows": {"base": shares, "sigma reversed": shares},
        "facts": {"loss": 0.5},
    }
    page = tell.told(f"before\n{tell.START}old\n{tell.END}after\n", found)
    assert page.startswith(f"before\n{tell.START}")
    assert page.endswith(f"{tell.END}after\n")
    assert "old" not in page
    assert "| sigma reversed | 50% |" in page
    assert "- loss: 0.5" in page
