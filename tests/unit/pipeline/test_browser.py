"""The pages of a run as a browser has them: a silent console, charts drawn, a slider for keyboard and pointer.

Read on a phone and in the dark, too.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tiny import browser
from tiny.browser import Tab
from tiny.pages import HOSTILE, held_out_line, line, png, put_preview, write_run

from flux2_relay.pipeline import comparison
from flux2_relay.pipeline.report import write_report
from flux2_relay.pipeline.run_folder import open_run

pytestmark = pytest.mark.browser
PROMPTS = [HOSTILE, "a long prompt of many words that has to be wrapped on any telephone " * 3]
LEFT, RIGHT, END = ("ArrowLeft", 37), ("ArrowRight", 39), ("End", 35)


def write(folder: Path, loss: float) -> Path:
    """A run with everything on its page."""
    lines = "".join(
        line(step, loss + 1 / step, sigma=[step % 10 / 10], seconds=1 + step % 3 / 9) for step in range(1, 61)
    )
    write_run(folder, steps=60, prompts=PROMPTS, tail=lines)
    (folder / "validation.jsonl").write_text(
        "".join(held_out_line(step, loss + 1 / (step + 1)) for step in range(0, 61, 20))
    )
    for step in (0, 30, 60):
        for number in range(2):
            put_preview(folder, step, number, png(96, 64, 40 + 3 * step))
    (folder / "thumbnails").mkdir()
    Image.new("RGB", (64, 96), "red").save(folder / "thumbnails/aaaa.jpg")
    latents = {"key": "aaaa", "size": [64, 96], "references": 0, "mask": False}
    sample = {"id": HOSTILE, "captions": [HOSTILE], "all_captions": 1, "repeats": 1, "prior": False, "held_out": True}
    shown = [{**sample, "latents": [latents]}, {**sample, "latents": [{**latents, "key": "gone"}]}]
    data = {"pictures": 2, "captions": 2, "held_out": 1, "prior": 0, "buckets": [[64, 96, 2]], "shown": shown}
    told = {"data": data, "plan": {"peak_bytes": 24_000_000_000, "in_words": "8 bit, " * 60}}
    (folder / "origin.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [open_run(write(folder / name, loss)) for name, loss in (("fox", 0.3), ("dog", 0.4))]
    live = folder / "live"
    return {
        "report": write_report(*runs[0]),
        "comparison": comparison.write(runs),
        "live": write_report(*open_run(write(live, 0.5)), live=True),
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser.opened(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.mark.parametrize("name", ["report", "comparison", "live"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_nothing_is_wrong_anywhere(tab: Tab, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    tab.visit(pages[name], width, dark)
    assert tab.complaints() == []
    assert tab.find("document.documentElement.scrollWidth") == width
    assert tab.find("[...document.images].every(image => image.complete && image.naturalWidth)")
    assert tab.find("document.scripts.length") == 1
    assert tab.find("document.querySelectorAll('figure').length") >= 7


def test_a_console_with_errors_is_noticed(tab: Tab, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><meta charset=utf-8><script>missing()</script><img src='http://localhost:9/x.png'>")
    tab.visit(page)
    assert len(tab.complaints()) >= 2


def test_every_curve_is_drawn_inside_its_chart(tab: Tab, pages: dict[str, Path]) -> None:
    tab.visit(pages["report"])
    drawn = tab.find("""[...document.querySelectorAll("svg[data-frame]")].map(svg => {
      const all = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("path[data-name]")].map(path => {
        const box = path.getBoundingClientRect();
        return {name: path.dataset.name, length: path.getTotalLength(), colour: getComputedStyle(path).stroke,
          inside: box.left >= all.left && box.right <= all.right + 1 && box.top >= all.top && box.bottom <= all.bottom};
      });
    })""")
    assert len(drawn) == 10
    paths = [path for chart in drawn for path in chart]
    assert all(path["inside"] and path["colour"] not in ("none", "") for path in paths)
    assert all(path["length"] > 20 for path in paths if path["name"].startswith(("mean", "sigma", "planned")))
    assert {"planned", "measured"} <= {path["name"] for path in paths}


def test_values_are_told_under_the_pointer(tab: Tab, pages: dict[str, Path]) -> None:
    tab.visit(pages["report"])
    x, y = tab.find("""(() => { const svg = document.querySelector("svg[data-frame]"); svg.scrollIntoView();
      const box = svg.getBoundingClientRect(); return [box.left + box.width / 2, box.top + 50]; })()""")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = tab.find('document.querySelector(".readout").textContent')
    step, _, values = said.partition(": ")
    number = int(step.removeprefix("step "))
    assert 20 < number < 40
    told = dict(value.rsplit(" ", 1) for value in values.split(", "))
    assert float(told["a step"]) == pytest.approx(0.3 + 1 / number, abs=0.01)


def test_the_slider_obeys_keys_and_pointer(tab: Tab, pages: dict[str, Path]) -> None:
    tab.visit(pages["report"])
    at = """getComputedStyle(document.querySelector(".stage")).getPropertyValue("--at")"""
    shown = """[...document.querySelectorAll(".stage img")].map(image => [image.alt, image.naturalWidth])"""
    assert tab.find("document.querySelector('.compare').hidden") is False
    assert tab.find(at) == "50%"
    assert tab.find(shown) == [[f"{HOSTILE}, step 60", 96], [f"{HOSTILE}, step 0", 96]]
    tab.find("document.querySelector('.compare select').focus()")
    order = []
    for _ in range(4):
        order.append(tab.find("document.activeElement.tagName"))
        tab.press("Tab", 9)
    assert order == ["SELECT", "SELECT", "SELECT", "INPUT"]
    tab.find("document.querySelector('.stage input').focus()")
    for key in (RIGHT, RIGHT, LEFT, RIGHT):
        tab.press(*key)
    assert tab.find(at) == "52%"
    clip = """getComputedStyle(document.querySelectorAll(".stage img")[1]).clipPath"""
    before = tab.find(clip)
    tab.press(*END)
    assert tab.find(at) == "100%"
    assert tab.find(clip) != before
    x, y, width = tab.find("""(() => { const stage = document.querySelector(".stage"); stage.scrollIntoView();
      const box = stage.getBoundingClientRect(); return [box.left, box.top + box.height / 2, box.width]; })()""")
    for kind in ("mousePressed", "mouseReleased"):
        tab.call("Input.dispatchMouseEvent", type=kind, x=x + width / 4, y=y, button="left", clickCount=1)
    assert float(tab.find(at)[:-1]) == pytest.approx(25, abs=3)
    assert "step 0" in tab.find("""document.querySelector(".stage input").getAttribute("aria-valuetext")""")


def test_a_click_in_the_grid_and_a_choice_change_the_pictures(tab: Tab, pages: dict[str, Path]) -> None:
    tab.visit(pages["report"])
    alts = """[...document.querySelectorAll(".stage img")].map(image => image.alt)"""
    tab.find("""[...document.querySelectorAll(".previews img")].find(i => i.dataset.name === "step 30").click()""")
    assert tab.find(alts) == [f"{HOSTILE}, step 30", f"{HOSTILE}, step 0"]
    tab.find("""(() => { const select = document.querySelector(".compare select"); select.selectedIndex = 1;
      select.dispatchEvent(new Event("change")); })()""")
    assert tab.find(alts) == [f"{PROMPTS[1]}, step 30", f"{PROMPTS[1]}, step 0"]


def test_the_slider_goes_from_one_run_to_another(tab: Tab, pages: dict[str, Path]) -> None:
    tab.visit(pages["comparison"])
    names = """[...document.querySelectorAll(".stage span")].map(span => span.textContent)"""
    assert tab.find(names) == ["fox, step 60", "dog, step 60"]
    assert tab.find("document.querySelectorAll('.compare select')[1].options.length") == 6


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_both_schemes(tab: Tab, pages: dict[str, Path], name: str, dark: bool) -> None:
    """WCAG asks for a contrast of 4.5; 3 of what is no text."""
    tab.visit(pages[name], dark=dark)
    contrasts = tab.find("""(() => {
      const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const light = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
          .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; };
      const root = getComputedStyle(document.documentElement), of = name => light(root.getPropertyValue("--" + name));
      const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      return {dark: of("paper") < .1, text: ["ink", "soft"].map(name => contrast(of(name), of("card"))),
        curves: [..."abcdefgh"].map(name => contrast(of(name), of("card")))};
    })()""")
    assert contrasts["dark"] is dark
    assert min(contrasts["text"]) >= 4.5
    assert min(contrasts["curves"]) >= 3


def test_a_phone_keeps_text_readable(tab: Tab, pages: dict[str, Path]) -> None:
    tab.visit(pages["report"], 390)
    sizes = tab.find("""[...document.querySelectorAll("svg[data-frame] text")].map(text =>
      parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.clientWidth
      / text.ownerSVGElement.viewBox.baseVal.width)""")
    assert min(sizes) >= 8.5
    assert tab.find("parseFloat(getComputedStyle(document.querySelector('.stage')).width)") <= 390


def test_a_picture_can_be_taken(tab: Tab, pages: dict[str, Path], tmp_path: Path) -> None:
    """Curves show on the screen, not only in the document."""
    tab.visit(pages["report"])
    tab.picture(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        colours = image.convert("RGB").getcolors(1 << 24) or []
    assert (0x2B, 0x62, 0xB5) in {colour for _, colour in colours}
