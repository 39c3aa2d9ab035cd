"""The contact sheet of a run's previews."""

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux2_relay.stages.decode.sheet import contact_sheet


def preview(path: Path, prompt: str | None) -> Path:
    told = PngInfo()
    if prompt is not None:
        told.add_text("prompt", prompt)
    Image.new("RGB", (32, 16), "red").save(path, pnginfo=told)
    return path


def sheet(folder: Path, *prompts: str | None) -> Image.Image:
    """Two steps of some prompts."""
    files = {(n, step): preview(folder / f"{n}-{step}.png", text) for n, text in enumerate(prompts) for step in (0, 9)}
    contact_sheet(files, folder / "sheet.png")
    with Image.open(folder / "sheet.png") as drawn:
        return drawn.convert("RGB")


def test_prompts_stand_beside_their_rows(tmp_path: Path) -> None:
    bare, one, two = (sheet(tmp_path, *p) for p in ((None, None), ("a red fox", None), (None, "a red fox")))
    margin = one.width - bare.width
    assert margin > 0
    for drawn, written in ((one, 0), (two, 1)):
        half = drawn.height // 2
        labels = [drawn.crop((0, top, margin, top + half)) for top in (0, half)]
        assert [label.getextrema() != ((255, 255),) * 3 for label in labels] == [written == 0, written == 1]


def test_a_long_prompt_is_cut(tmp_path: Path) -> None:
    assert sheet(tmp_path, "w" * 500).width == sheet(tmp_path, "w" * 60).width
