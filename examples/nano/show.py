"""Draw docs/demo.png from a run of the demo: every prompt before the first step, and after the last one.

    python examples/nano/show.py runs/nano --out docs/demo.png

Reads what `relay decode` made, nothing else; needs Pillow.
"""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LABEL, MARGIN = 128, 6, 52, 64  # pixels
LETTERS = 21  # of a line under a column


def pictures(run: Path) -> dict[int, list[Image.Image]]:
    """The decoded previews of a run: step -> one picture a prompt."""
    found: dict[int, list[Image.Image]] = {}
    for path in sorted((run / "previews").glob("*-*.png")):
        with Image.open(path) as picture:
            picture.load()
        found.setdefault(int(path.stem.partition("-")[0]), []).append(picture)
    return found


def draw(found: dict[int, list[Image.Image]]) -> Image.Image:
    """The first and the last step as two rows; the prompts, which the files say themselves, below."""
    first, last = min(found), max(found)
    columns = len(found[first])
    sheet = Image.new("RGB", (MARGIN + columns * (SIDE + GAP), 2 * (SIDE + GAP) + GAP + LABEL), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, step in enumerate((first, last)):
        top = GAP + row * (SIDE + GAP)
        pen.text((GAP, top + SIDE // 2 - 12), f"step\n{step:,}", "black", font)
        for column, picture in enumerate(found[step]):
            sheet.paste(picture.convert("RGB").resize((SIDE, SIDE)), (MARGIN + column * (SIDE + GAP), top))
    for column, picture in enumerate(found[first]):
        words = "\n".join(textwrap.wrap(picture.info["prompt"], LETTERS))
        pen.text((MARGIN + column * (SIDE + GAP), 2 * (SIDE + GAP) + GAP), words, "black", font, spacing=1)
    return sheet


def main() -> None:
    """Read a run folder, write one picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    draw(pictures(given.run)).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
