"""The report of a run: what it says, what it survives, and that it asks for nothing else."""

import base64
import io
import json
import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny.pages import HOSTILE, Page, line, png, put_preview, write_run

from flux2_relay.pipeline import charts
from flux2_relay.pipeline.config import load_config
from flux2_relay.pipeline.report import adapter_metadata, write_report
from flux2_relay.pipeline.report_metrics import in_bytes, read_metrics
from flux2_relay.pipeline.run_folder import RunFolder

Report = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "fox" / "previews").mkdir(parents=True)
    return RunFolder(tmp_path / "fox")


@pytest.fixture
def report(run: RunFolder) -> Report:
    """The page of a run of these losses, `steps` of which were wanted."""

    def write(losses: Sequence[float] = (), steps: int = 10, live: bool = False, **others: object) -> str:
        write_run(run.path, losses, steps, **others)  # pyright: ignore[reportArgumentType]
        path = write_report(run, load_config(run.path / "config.yaml"), live)
        assert path == run.path / "report.html"
        return path.read_text("utf-8")

    return write


@pytest.fixture
def preview(run: RunFolder):
    """Latents of one preview, with a picture or without."""

    def put(step: int, number: int, picture: bytes | None = None) -> Path:
        return put_preview(run.path, step, number, picture)

    return put


def adapter(run: RunFolder, **metadata: str) -> None:
    header = json.dumps({"__metadata__": {f"flux2_relay.{key}": value for key, value in metadata.items()}}).encode()
    run.adapter.write_bytes(struct.pack("<Q", len(header)) + header)


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
    page.asks_for_nothing()
    assert page.all("img")


def test_both_schemes_and_paper_are_provided_for(report: Report) -> None:
    text = report([1.0])
    for condition in ("prefers-color-scheme: dark", "@media print"):
        assert condition in text


def test_names_and_prompts_are_escaped(report: Report, preview) -> None:
    preview(0, 0, png(8, 8))
    page = Page(report([1.0], prompts=[HOSTILE], name="<b>&fox"))
    page.asks_for_nothing()
    assert len(page.all("b")) == len(page.all("figure"))  # the charts' titles and no more
    assert HOSTILE in page.text
    assert page.all("img")[0]["alt"] == f"{HOSTILE}, step 0"
    assert page.all("img")[0]["data-row"] == HOSTILE
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


def test_pictures_stand_before_curves_and_what_is_not_decoded_behind(report: Report, preview) -> None:
    preview(0, 0)
    page = report([1.0, 0.5], prompts=["a fox"])
    assert page.index("<h2>Curves") < page.index("<h2>Previews")
    preview(0, 0, png(8, 8))
    page = report([1.0, 0.5], prompts=["a fox"])
    assert page.index("<h2>Previews") < page.index("<h2>Curves") < page.index("<h2>Data set")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"device": "Device(cpu, 0)", "at": "2026-02-03T04:05:06.789+00:00"}, "CPU, 2026-02-03 04:05 UTC"),
        ({"device": "Device(gpu, 1)", "at": "2026-02-03T04:05:06+02:00"}, "GPU 1, 2026-02-03 02:05 UTC"),
        ({"device": "Apple M9", "at": "yesterday"}, "Apple M9, yesterday"),
    ],
)
def test_devices_and_times_are_written_as_people_do(run: RunFolder, report: Report, told: object, said: str) -> None:
    (run.path / "origin.json").write_text(json.dumps({"set": {"made": told}}))
    assert f"<code>{said}</code>" in report([1.0])


def test_undecoded_previews_say_what_to_run(run: RunFolder, report: Report, preview) -> None:
    preview(0, 0, png(8, 8))
    preview(4, 0)
    stale = preview(10, 0, png(8, 8))  # drawn again after it was decoded
    os.utime(stale.with_suffix(".png"), ns=(0, 0))
    page = Page(report([1.0], prompts=["a"]))
    assert f"2 of 3 previews are not decoded yet: run relay decode {run.path}" in page.text
    assert len(page.all("img")) == 1
    assert page.text.count("not decoded yet") == 3  # the sentence and both cells


def test_large_pictures_go_in_smaller_and_small_ones_as_they_are(report: Report, preview) -> None:
    preview(0, 0, png(1024, 768))
    preview(10, 0, small := png(256, 200))
    preview(5, 0, png(1024, 768)[:60])
    page = Page(report([1.0], prompts=["a"]))
    page.asks_for_nothing()
    large, other = page.all("img")
    assert (large["width"], large["height"]) == ("1024", "768")
    kind, _, data = large["src"].partition(";base64,")
    assert kind == "data:image/jpeg"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (640, 480)
    assert base64.b64decode(other["src"].partition(",")[2]) == small
    assert "000005-00.png is no PNG" in page.text


def test_of_many_steps_some_are_shown(run: RunFolder, report: Report, preview) -> None:
    for step in range(0, 101, 5):
        preview(step, 0, png(8, 8))
    page = Page(report([1.0], steps=100, prompts=["a"]))
    steps = [int(image["data-order"]) for image in page.all("img")]
    assert (len(steps), steps[0], steps[-1]) == (10, 0, 100)
    assert max(np.diff(steps)) <= 15
    assert f"Of 21 steps 10 are shown; all are in {run.path / 'previews'}" in page.text


def test_a_page_that_cannot_be_written_leaves_nothing_behind(run: RunFolder, report: Report) -> None:
    (run.path / "report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        report([1.0])
    assert [path.name for path in run.path.iterdir() if "report" in path.name] == ["report.html"]


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
    assert [re.split(",| over", label)[0] for label in labels] == [
        "Loss", "Loss by sigma", "Loss by sigma band", "Gradient norm", "Learning rate", "Time", "Waiting for data",
        "Peak memory",
    ]  # fmt: skip
    assert "nan" not in page.html.lower().replace("nano", "")


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
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (132_000, "132 kB"), (70_100_000, "70.1 MB"), (2.25e10, "22.5 GB")]
)
def test_bytes_in_words(size: float, said: str) -> None:
    assert in_bytes(size) == said
