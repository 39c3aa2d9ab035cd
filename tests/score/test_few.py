"""The first of the fifty captions, in few steps: to move into tests/unit/test_nano.py once it holds."""

from score import bounds, scores
from score.prompts import MODEL, captions
from score.studio import Studio


def test_the_base_follows_a_few_captions_in_few_steps() -> None:
    few = range(bounds.FEW_PROMPTS)
    pictures = Studio(model=MODEL, steps=bounds.FEW_STEPS).draw(captions(len(few)), few)
    assert scores.score(pictures).follows >= bounds.FOLLOWS
