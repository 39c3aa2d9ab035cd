"""Make the lesson: a few captioned pictures in a style that the base model never saw, and as many in its own.

    python examples/nano/make_data.py --out examples/nano/data --prior examples/nano/prior

Sixteen pictures in three shapes, outlined and hatched with ink, each with its caption in a .txt file beside it. The
captions are the base's own; the trigger word is put in front by the config (`data.trigger`). No star and nothing
purple is among them, so prompts with those show what the adapter learned beyond its pictures. The prior pictures are
flat, of anything that the base knows, and get no trigger: what they show is to stay as it is. Needs torch and Pillow;
the same seed gives the same files, in a second on any machine.
"""

import argparse
import random
from pathlib import Path

import torch
from pictures import Pen, distances, drawn, flat, lay_out, lesson_pen, pack
from PIL import Image
from scenes import SHAPES, Scene, describe, draw_scene
from scenes import SIZES as RADII

SIZES = ((128, 128),) * 12 + ((160, 96),) * 2 + ((96, 160),) * 2
"""Width and height of each picture: three buckets of the resolution 128."""
LEFT_OUT = {"star", "purple"}
LEAST_INKED = 0.05
"""Sum of the figures' squared radii, as shares of the shorter side: small figures would show little of a style."""
SEED, PRIOR_SEED = 5, 77


def draw_lesson(seed: int) -> list[Scene]:
    """Scenes for `SIZES` without what is left out: the shapes in turn, every third scene a pair."""
    rng = random.Random(seed)
    shapes = [shape for shape in SHAPES if shape not in LEFT_OUT]
    scenes: list[Scene] = []
    while len(scenes) < len(SIZES):
        scene = draw_scene(rng)
        words = {word for f in scene.figures for word in (f.shape, f.colour)} | {scene.background}
        in_turn = scene.figures[0].shape == shapes[len(scenes) % len(shapes)]
        fresh = scene.background not in [other.background for other in scenes[-5:]]
        is_large = sum(RADII[figure.size] ** 2 for figure in scene.figures) >= LEAST_INKED
        is_in_turn = in_turn and (scene.relation is not None) == (len(scenes) % 3 == 2)
        if not words & LEFT_OUT and is_in_turn and fresh and is_large:
            scenes.append(scene)
    return scenes


def draw_picture(scene: Scene, size: tuple[int, int], seed: int, pen: Pen | None) -> torch.Tensor:
    """A scene [3, H, W] in [-1, 1], flat or drawn with a pen."""
    packed = pack([scene])
    layout = lay_out(packed, size[1], size[0], torch.Generator().manual_seed(seed))
    distance = distances(packed, layout, size[1], size[0])
    picture = flat(packed, distance)
    return (picture if pen is None else drawn(picture, distance, pen))[0]


def save(picture: torch.Tensor, path: Path) -> None:
    """One picture [3, H, W] in [-1, 1] as a file."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path, optimize=True)


def write(folder: Path, scenes: list[Scene], seed: int, pen: Pen | None = None) -> None:
    """Scenes as pictures and captions, numbered, in the sizes of the lesson."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (scene, size) in enumerate(zip(scenes, SIZES, strict=True)):
        save(draw_picture(scene, size, seed + number, pen), folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(describe(scene) + "\n", encoding="utf-8")


def main() -> None:
    """Write the pictures and captions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prior", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    write(given.out, draw_lesson(given.seed), given.seed, lesson_pen(1))
    rng = random.Random(PRIOR_SEED)
    write(given.prior, [draw_scene(rng) for _ in SIZES], PRIOR_SEED)


if __name__ == "__main__":
    main()
