"""The report of a run: what it says, what it survives, and that it asks for nothing else."""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pytest

from flux2_relay.pipeline import charts
from flux2_relay.pipeline.config import load_config
from flux2_relay.pipeline.report import adapter_metadata, in_bytes, read_metrics, write_report
from flux2_relay.pipeline.run_folder import RunFolder

CONFIG = """
run: {{name: '{name}', dir: {folder}}}
model: {{path: models/FLUX.2-dev}}
data: {{path: data/fox}}
train: {{steps: {steps}, batch: 2}}
previews: {{prompts: {prompts}, size: [64, 96]}}
"""
Report = Callable[..., str]


def line(step: int, loss: object = 1.0, **others: object) -> str:
    values = {
        "step": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "sigma": [0.25, 0.75], "seconds": 2.0,
        "wait_seconds": 0.01, "peak_bytes": 22_500_000_000,
    }  # fmt: skip
    return json.dumps({**values, **others}) + "\n"


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "fox" / "previews").mkdir(parents=True)
    return RunFolder(tmp_path / "fox")


@pytest.fixture
def report(run: RunFolder) -> Report:
    """The page of a run of these losses, `steps` of which were wanted."""

    def write(
        losses: Sequence[float] = (), steps: int = 10, prompts: Sequence[str] = (), name: str = "fox", tail: str = ""
    ) -> str:
        text = CONFIG.format(name=name, folder=run.path.parent, steps=steps, prompts=json.dumps(list(prompts)))
        (run.path / "config.yaml").write_text(text, encoding="utf-8")
        lines = "".join(line(step, loss) for step, loss in enumerate(losses, 1))
        run.metrics.write_text(lines + tail, encoding="utf-8")
        path = write_report(run, load_config(run.path / "config.yaml"))
        assert path == run.path / "report.html"
        return path.read_text("utf-8")

    return write


@pytest.fixture
def preview(run: RunFolder):
    """Latents of one preview, with a picture or without."""

    def put(step: int, number: int, picture: bytes | None = None) -> Path:
        latents = run.path / "previews" / f"{step:06d}-{number:02d}.safetensors"
        latents.write_bytes(b"latents")
        if picture is not None:
            latents.with_suffix(".png").write_bytes(picture)
        return latents

    return put


def adapter(run: RunFolder, **metadata: str) -> None:
    header = json.dumps({"__metadata__": {f"flux2_relay.{key}": value for key, value in metadata.items()}}).encode()
    run.adapter.write_bytes(struct.pack("<Q", len(header)) + header)


class Page(HTMLParser):
    """Every element with its attributes, all text, and a check that elements close in order."""

    VOID = ("meta", "img", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.said: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.said).split())


def test_the_verdict_compares_the_fifths(run: RunFolder, report: Report) -> None:
    adapter(run)
    text = Page(report([2.0, 2.0, *[9.0] * 6, 1.0, 1.0])).text
    assert "10 of 10 steps done; loss 2 → 1, first to last fifth of the steps; adapter" in text
    assert str(run.adapter) in text
    assert "-50% since the first fifth" in text
    assert "not finished" not in text


def test_a_run_under_way_says_where_it_goes_on(run: RunFolder, report: Report) -> None:
    for step in ("000002", "000004", ".new-000006"):
        (run.path / "checkpoints" / step).mkdir(parents=True)
    assert "5 of 10 steps done" in (text := Page(report([1.0] * 5)).text)
    assert "not finished: the same relay train goes on from step 4" in text


def test_a_page_asks_for_nothing(report: Report, preview) -> None:
    preview(0, 0, png(8, 8))
    page = Page(report([1.0, 0.5], prompts=["a"]))
    assert {name for name, _ in page.elements} & {"script", "link", "iframe", "object", "base"} == set()
    addresses = [
        value for _, found in page.elements for key, value in found.items() if key in ("src", "href", "srcset")
    ]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert "url(" not in page.rawdata
    assert "@import" not in page.rawdata


def test_both_schemes_and_paper_are_provided_for(report: Report) -> None:
    text = report([1.0])
    for condition in ("prefers-color-scheme: dark", "@media print"):
        assert condition in text


def test_names_and_prompts_are_escaped(report: Report, preview) -> None:
    preview(0, 0, png(8, 8))
    hostile = "<script>alert('x')</script> & \"y\""
    page = Page(report([1.0], prompts=[hostile], name="<b>&fox"))
    assert not page.all("script")
    assert len(page.all("b")) == len(page.all("figure"))  # the charts' titles and no more
    assert hostile in page.text
    assert page.all("img")[0]["alt"] == f"{hostile}, step 0"
    assert "<b>&fox" in page.text


def test_previews_stand_prompts_by_steps(report: Report, preview) -> None:
    for step in (0, 4, 10):
        for number in (0, 1):
            preview(step, number, png(step + 8, 8))
    page = Page(report([1.0], prompts=["first prompt", "second prompt"]))
    assert [image["alt"] for image in page.all("img")] == [
        f"{prompt} prompt, step {step}" for prompt in ("first", "second") for step in (0, 4, 10)
    ]
    assert [image["width"] for image in page.all("img")] == ["8", "12", "18"] * 2
    assert re.search(r"step 0 ?before training.*step 4.*step 10 ?final", page.text)
    assert "64 x 96, 28 steps" in page.text
    assert "not decoded" not in page.text


def test_prompts_with_and_without_the_trigger_stand_in_one_row(run: RunFolder, report: Report, preview) -> None:
    for step in (0, 4, 10):
        for number in range(4):
            preview(step, number, png(8, 8))
    prompts = ["a cat", "zorg a cat", "zorg a dog", "zorgling"]
    report([1.0], prompts=prompts)
    config = run.path / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("data: {", "data: {trigger: zorg, "), "utf-8")

    def shown() -> list[str]:
        page = Page(write_report(run, load_config(config)).read_text("utf-8"))
        assert re.search("step 0 ?with the trigger, before training.*step 10 ?without it, final", page.text)
        return [image["alt"] for image in page.all("img")]

    pair = [f"{prompt}, step {step}" for prompt in ("zorg a cat", "a cat") for step in (0, 10)]
    assert shown() == pair + [f"{prompt}, step {step}" for prompt in prompts for step in (0, 4, 10)]
    for number in range(4):
        (run.path / "previews" / f"000004-{number:02d}.safetensors").unlink()
    assert shown() == pair + [f"{prompt}, step {step}" for prompt in prompts[2:] for step in (0, 10)]


def test_undecoded_previews_say_what_to_run(run: RunFolder, report: Report, preview) -> None:
    preview(0, 0, png(8, 8))
    preview(4, 0)
    stale = preview(10, 0, png(8, 8))  # drawn again after it was decoded
    os.utime(stale.with_suffix(".png"), ns=(0, 0))
    page = Page(report([1.0], prompts=["a"]))
    assert f"2 of 3 previews are not decoded yet: run relay decode {run.path}" in page.text
    assert len(page.all("img")) == 1
    assert page.text.count("not decoded yet") == 3  # the sentence and both cells


def test_a_gap_and_a_broken_picture_do_not_stop_the_page(report: Report, preview) -> None:
    preview(0, 0, png(8, 8))
    preview(4, 1, b"no picture")
    text = Page(report([1.0], prompts=["a"])).text
    assert text.count("not drawn") == 2
    assert "000004-01.png is no PNG" in text


def test_no_previews_and_no_steps(report: Report) -> None:
    text = Page(report()).text
    assert "0 of 10 steps done" in text
    assert "No step has been done yet." in text
    assert "None were drawn (previews.prompts)." in text


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 16, 100])
def test_short_runs_have_every_chart(report: Report, steps: int) -> None:
    page = Page(report([1.0 / step for step in range(1, steps + 1)], steps=steps))
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert [label.split(",")[0] for label in labels] == [
        "Loss", "Loss by sigma", "Gradient norm", "Time", "Learning rate", "Peak memory"
    ]  # fmt: skip
    assert "nan" not in page.rawdata.lower().replace("nano", "")


def test_constant_zeros_are_drawn(run: RunFolder, report: Report) -> None:
    zeros = line(1, 0.0, lr=0, grad_norm=0, seconds=0, wait_seconds=0, peak_bytes=0, sigma=[0])
    text = report([], steps=1, tail=zeros)
    assert "1 of 1 steps done; loss 0;" in Page(text).text


def test_a_killed_run_shows_its_whole_lines(report: Report) -> None:
    assert "3 of 10 steps done" in Page(report([3.0, 2.0, 1.0], tail='{"step": 4, "lo')).text


def test_lines_without_a_number_are_left_out(run: RunFolder) -> None:
    run.metrics.write_text(
        line(1) + line(2, loss=math.nan) + '{"step": 3}\n' + line(4, sigma=[0.2, 0.4]) + line(5, loss="x")
    )
    metrics = read_metrics(run)
    assert metrics.step.tolist() == [1, 4]
    assert metrics.sigma.tolist() == pytest.approx([0.5, 0.3])


def test_a_long_run_stays_small(report: Report) -> None:
    rng = np.random.default_rng(0)
    text = report((1 + rng.random(10_000)).tolist(), steps=10_000)
    assert len(text.encode()) < 500_000
    assert "Of 10,000 steps 1,000 are drawn." in Page(text).text
    for drawn in re.findall(r' d="([^"]*)"', text):
        assert len(re.findall("[ML]", drawn)) <= charts.MOST_POINTS


def test_where_the_run_came_from(run: RunFolder, report: Report) -> None:
    adapter(run, version="0.0.7", set="c" * 64)
    assert "c" * 64 in (text := Page(report([1.0])).text)
    assert "flux2-relay 0.0.7" in text
    checkpoint = run.path / "checkpoints" / "000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 1, "seed": 0, "set": "d" * 64}))
    (run.path / "log.txt").write_text("transformer <loaded>\n")
    page = Page(report([1.0]))
    assert "d" * 64 in page.text
    assert "c" * 64 not in page.text
    assert "transformer <loaded>" in page.text
    assert "path: data/fox" in page.text
    assert len(page.all("details")) == 2


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_an_adapter_that_says_nothing(run: RunFolder, data: bytes) -> None:
    run.adapter.write_bytes(data)
    assert adapter_metadata(run.adapter) == {}


def test_a_page_is_written_whole(run: RunFolder, report: Report) -> None:
    first = report([1.0])
    assert report([1.0, 0.5]) != first
    assert [path.name for path in run.path.glob("report*")] == ["report.html"]


@pytest.mark.parametrize(
    ("size", "said"), [(999, "0.999 kB"), (132_000, "132 kB"), (70_100_000, "70.1 MB"), (2.25e10, "22.5 GB")]
)
def test_bytes_in_words(size: float, said: str) -> None:
    assert in_bytes(size) == said


@pytest.mark.parametrize(
    ("low", "high", "count", "least", "expected"),
    [
        (0, 1, 5, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 0.92, 5, 0, [0.4, 0.6, 0.8]),
        (0, 1e-4, 4, 0, [0, 5e-5, 1e-4]),
        (1, 3, 8, 1, [1, 2, 3]),
        (-30, 250, 5, 0, [0, 100, 200]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, least: float, expected: list[float]) -> None:
    assert charts.ticks(low, high, count, least) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (0.25, "0.25"), (1500, "1,500"), (1e-4, "1e-4"), (1.5e-3, "1.5e-3"), (-2, "-2")]
)
def test_tick_labels(value: float, said: str) -> None:
    assert charts.short(value) == said


def test_smoothing_is_a_mean_of_the_nearest() -> None:
    assert charts.smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert charts.smooth(np.full(50, 2.0), 7).tolist() == [2.0] * 50


def test_bins_skip_what_holds_too_little() -> None:
    x, y = np.array([0.1, 0.3, 0.3, 1.0]), np.array([1.0, 2.0, 4.0, 8.0])
    every, some = (charts.binned(x, y, np.linspace(0, 1, 5), least) for least in (1, 2))
    assert [part.tolist() for part in every] == [[0.1, 0.3, 1.0], [1.0, 3.0, 8.0]]
    assert [part.tolist() for part in some] == [[0.3], [3.0]]


def chart(y: Sequence[float], style: Literal["points", "line", "dots"] = "points", **others) -> charts.Chart:
    x = np.arange(1.0, len(y) + 1)
    series = [charts.Series(x=x, y=np.array(y), name="values", style=style)]
    return charts.Chart(title="T", x_label="step", y_label="y", series=series, **others)


def test_a_chart_is_sound_xml_inside_its_size() -> None:
    root = ElementTree.fromstring(chart([1.0, 5.0, 2.0], "dots", level=3.0, size=(300, 200)).svg())
    numbers = [float(n) for path in root.iter("path") for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
    assert all(0 <= number <= 300 for number in numbers)
    assert [path for path in root.iter("path") if path.attrib["class"] == "level"]


def test_a_level_far_above_the_values_is_left_out() -> None:
    near, far = (chart([1.0, 5.0, 2.0], level=level) for level in (9.0, 99.0))
    assert (near.shows_level(), far.shows_level()) == (True, False)
    assert ('class="level"' in near.svg(), 'class="level"' in far.svg()) == (True, False)


def test_higher_values_are_drawn_higher() -> None:
    (drawn,) = re.findall(r'class="line a" d="M([^"]*)"', chart([1.0, 3.0, 2.0], "line").svg())
    (_, low), (_, high), (_, middle) = ([float(n) for n in point.split()] for point in drawn.split("L"))
    assert high < middle < low


def test_one_slow_step_does_not_flatten_the_rest() -> None:
    usual = [2.0 + step % 3 * 0.1 for step in range(100)]
    slow = chart([60.0, *usual], from_zero=True)
    assert slow.above() == 1
    assert "aria-label" in slow.svg()
    assert chart(usual, from_zero=True).above() == 0
