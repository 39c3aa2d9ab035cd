"""Contact sheets: pictures in rows and columns, with what tells them apart written beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import combining, normalize

from PIL import Image, ImageDraw

_CELL, _GAP, _LABEL = 256, 8, 16  # pixels
_LETTER = 7  # pixels that a letter is allowed
_LONGEST = 60  # letters of a prompt

Pictures = Mapping[tuple[int, int], Path]
"""Files by (row, column), counted from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What is written above the columns, beside the rows and on top; rows may go without."""

    columns: Sequence[str]
    rows: Sequence[str]
    title: str = ""


def contact_sheet(pictures: Pictures, path: Path) -> None:
    """Draw previews, by (prompt number, step), as one PNG: a row a prompt, named as its files are, a column a step."""
    prompts = sorted({prompt for prompt, _ in pictures})
    steps = sorted({step for _, step in pictures})
    placed = {(prompts.index(prompt), steps.index(step)): file for (prompt, step), file in pictures.items()}
    rows = [_prompt_of(next(file for (n, _), file in pictures.items() if n == prompt)) for prompt in prompts]
    draw_sheet(placed, Labels(columns=[f"step {step}" for step in steps], rows=rows), path)


def _prompt_of(file: Path) -> str:
    """What a preview says of itself, or as much of it as fits beside a row."""
    with Image.open(file) as picture:
        return _legible(str(picture.info.get("prompt", "")), _LONGEST)


def draw_sheet(pictures: Pictures, labels: Labels, path: Path, cell: int = _CELL) -> None:
    """Draw the pictures as one PNG, each at most `cell` pixels wide and high, with `labels` around them."""
    margin = _LETTER * max(map(len, labels.rows)) + (_GAP if any(labels.rows) else 0)
    top = _LABEL * (2 if labels.title else 1)
    width, height = margin + _edge(len(labels.columns), cell), top + _edge(len(labels.rows), cell)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 2), _legible(labels.title, width // _LETTER), fill="black")
    for column, label in enumerate(labels.columns):
        pen.text((margin + _edge(column, cell), top - _LABEL + 2), _legible(label, cell // _LETTER), fill="black")
    for row, label in enumerate(labels.rows):
        pen.text((_GAP, top + _edge(row, cell) + 2), _legible(label, len(label)), fill="black")
    for (row, column), file in pictures.items():
        sheet.paste(_fitted(file, cell), (margin + _edge(column, cell), top + _edge(row, cell)))
    aside = path.with_suffix(".part")
    sheet.save(aside, "PNG")
    aside.replace(path)


def _fitted(file: Path, cell: int) -> Image.Image:
    """A picture whose longer side is `cell` pixels."""
    with Image.open(file) as picture:
        whole = picture.convert("RGB")
    scale = cell / max(whole.size)
    size = round(whole.width * scale), round(whole.height * scale)
    return whole.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _legible(text: str, most: int) -> str:
    """A text in the letters that Pillow's own font surely has, cut to `most` of them."""
    plain = "".join(letter for letter in normalize("NFKD", text) if not combining(letter))  # é as e
    line = " ".join(plain.split()).encode("ascii", "replace").decode("ascii")
    return line if len(line) <= most else f"{line[: max(0, most - 3)]}..."


def _edge(cells: int, cell: int) -> int:
    return _GAP + cells * (cell + _GAP)
