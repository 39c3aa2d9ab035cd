"""The captions that the score is about: scenes such as the model knows, the same fifty every time."""

import random
import sys
from pathlib import Path

from score import bounds

ROOT = Path(__file__).parents[2]
NANO = ROOT / "examples/nano"
MODEL, DATA, PRIOR, CONFIG = NANO / "model", NANO / "data", NANO / "prior", ROOT / "configs/nano.yaml"

sys.path.insert(0, str(NANO))
from scenes import Scene, describe, draw_scene  # noqa: E402

TRIGGER = "photo"


def scenes(count: int = bounds.PROMPTS) -> list[Scene]:
    """The first `count` of the scenes."""
    rng = random.Random(bounds.SEED)
    return [draw_scene(rng) for _ in range(count)]


def captions(count: int = bounds.PROMPTS) -> list[str]:
    """What the scenes are called."""
    return list(map(describe, scenes(count)))
