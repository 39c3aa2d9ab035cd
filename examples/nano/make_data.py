"""Make the lesson: a few captioned pictures in a style that the base model never saw.

    python examples/nano/make_data.py --out examples/nano/data

Sixteen pictures in three shapes, outlined and hatched with ink, each with its caption in a .txt file beside it. The
captions are the base's own; the trigger word is put in front by the config (`data.trigger`). No star and nothing
purple is among them, so prompts with those show what the adapter learned beyond its pictures. Needs torch and Pillow;
the same seed gives the same files, in a second on any machine.
"""

import argparse
import random
from pathlib import Path

import torch
from pictures import distances, drawn, flat, lay_out, lesson_pen, pack
from PIL import Image
from scenes import SHAPES, Scene, describe, draw_scene
from scenes import SIZES as RADII

SIZES = ((128, 128),) * 12 + ((160, 96),) * 2 + ((96, 160),) * 2
"""Width and height of each picture: three buckets of the resolution 128."""
LEFT_OUT = {"star", "purple"}
LEAST_INKED = 0.05
"""Sum of the figures' squared radii, as shares of the shorter side: small figures would show little of a style."""
SEED = 5


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


def draw_pictures(scenes: list[Scene], size: tuple[int, int], seed: int) -> torch.Tensor:
    """Scenes in the lesson's style -> [N, 3, H, W] in [-1, 1]."""
    packed = pack(scenes)
    layout = lay_out(packed, size[1], size[0], torch.Generator().manual_seed(seed))
    distance = distances(packed, layout, size[1], size[0])
    return drawn(flat(packed, distance), distance, lesson_pen(len(scenes)))


def save(picture: torch.Tensor, path: Path) -> None:
    """One picture [3, H, W] in [-1, 1] as a file."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path, optimize=True)


def main() -> None:
    """Write the pictures and captions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for number, (scene, size) in enumerate(zip(draw_lesson(given.seed), SIZES, strict=True)):
        (picture,) = draw_pictures([scene], size, given.seed + number)
        save(picture, given.out / f"{number:02}.png")
        (given.out / f"{number:02}.txt").write_text(describe(scene) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
