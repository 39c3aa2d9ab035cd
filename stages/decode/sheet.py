"""The contact sheet: a row a prompt, a column a step, so that one look shows what training did."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

_CELL, _GAP, _LABEL = 256, 8, 16  # pixels


def contact_sheet(pictures: Mapping[tuple[int, int], Path], path: Path) -> None:
    """Draw the pictures, by (prompt number, step), as one PNG with the steps written above."""
    prompts = sorted({prompt for prompt, _ in pictures})
    steps = sorted({step for _, step in pictures})
    sheet = Image.new("RGB", (_edge(len(steps)), _edge(len(prompts)) + _LABEL), "white")
    pen = ImageDraw.Draw(sheet)
    for column, step in enumerate(steps):
        pen.text((_edge(column), 2), f"step {step}", fill="black")
    for (prompt, step), file in pictures.items():
        with Image.open(file) as picture:
            cell = picture.convert("RGB")
        scale = _CELL / max(cell.size)
        cell = cell.resize(
            (round(cell.width * scale), round(cell.height * scale)),
            Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS,
        )
        sheet.paste(cell, (_edge(steps.index(step)), _edge(prompts.index(prompt)) + _LABEL))
    aside = path.with_suffix(".part")
    sheet.save(aside, "PNG")
    aside.replace(path)


def _edge(cells: int) -> int:
    return _GAP + cells * (_CELL + _GAP)
