"""The page while training goes on: written again at every preview, and never a reason to stop."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny.pages import Page, line, png, put_preview, write_run
from tiny.project import Project

from flux2_relay.pipeline import live, report
from flux2_relay.pipeline.config import load_config
from flux2_relay.pipeline.run_folder import RunFolder

_moments = itertools.count(1)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(write_run(tmp_path / "fox", prompts=["a"]))


@pytest.fixture
def watched(run: RunFolder) -> live.Watched:
    return live.Watched(run, run, load_config(run.path / "config.yaml"))


def step(watched: live.Watched, number: int) -> None:
    watched.write(json.loads(line(number)))


def drawn(run: RunFolder, number: int, picture: bytes | None = None) -> None:
    """A preview; file systems whose clock is coarse would give two of them one date."""
    put_preview(run.path, number, 0, picture)
    moment = next(_moments)
    os.utime(run.path / "previews", (moment, moment))


def page(run: RunFolder) -> Page:
    return Page((run.path / "report.html").read_text("utf-8"))


def test_every_preview_makes_a_new_page(run: RunFolder, watched: live.Watched) -> None:
    watched.rewind(0)
    assert "0 of 10 steps done; training goes on" in page(run).text
    for number in (1, 2, 3):
        step(watched, number)
    assert "0 of 10 steps done" in page(run).text  # no preview yet
    drawn(run, 3)
    step(watched, 4)
    assert "4 of 10 steps done" in page(run).text
    assert "not decoded yet" in page(run).text
    step(watched, 5)
    assert "4 of 10 steps done" in page(run).text
    drawn(run, 3, png(8, 8))  # `relay decode` beside the training
    step(watched, 6)
    assert "6 of 10 steps done" in page(run).text
    assert len(page(run).all("img")) == 1


def test_without_previews_time_makes_a_new_page(
    run: RunFolder, watched: live.Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.rewind(0)
    monkeypatch.setattr(live, "PATIENCE", -1.0)
    step(watched, 1)
    assert "1 of 10 steps done" in page(run).text


def test_a_page_reloads_itself_while_it_runs_and_no_longer(run: RunFolder) -> None:
    config = load_config(run.path / "config.yaml")
    with live.watched(run, run, config) as watched:
        watched.rewind(0)
        during = page(run)
        step(watched, 1)
    during.asks_for_nothing()
    assert [meta["content"] for meta in during.all("meta") if meta.get("http-equiv") == "refresh"] == ["60"]
    assert "data-live" in during.all("body")[0]
    after = page(run)
    assert "data-live" not in after.all("body")[0]
    assert not [meta for meta in after.all("meta") if meta.get("http-equiv") == "refresh"]
    assert "1 of 10 steps done" in after.text
    assert "not finished: the same relay train goes on from step 0" in after.text


def test_a_failing_training_leaves_its_page(run: RunFolder) -> None:
    def train() -> None:
        with live.watched(run, run, load_config(run.path / "config.yaml")) as watched:
            watched.rewind(0)
            step(watched, 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train()
    assert "1 of 10 steps done" in page(run).text


def test_what_goes_wrong_with_the_page_is_said_once(
    run: RunFolder, watched: live.Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of charts")

    monkeypatch.setattr(report, "write_report", fail)
    for number in (1, 2):
        drawn(run, number)
        step(watched, number)
    watched.write_page(live=False)
    assert capsys.readouterr().out.count("the report could not be written (of charts); training goes on") == 1
    assert [found["step"] for found in run.lines()] == [1, 2]


def test_a_training_writes_it_and_outlives_a_page_that_cannot_be(encoded: Callable[..., Project]) -> None:
    whole = encoded(train={"steps": 2}, previews={"every": 1})
    assert whole.relay("train").status == 0
    assert "2 of 2 steps done" in page(RunFolder(whole.run)).text
    broken = encoded(train={"steps": 2}, previews={"every": 1})
    (broken.run / "report.html").mkdir(parents=True)
    outcome = broken.relay("train")
    assert outcome.status == 0, outcome.said
    assert outcome.said.count("the report could not be written") == 1
    assert (broken.run / "adapter.safetensors").read_bytes()
    assert broken.metrics("loss") == whole.metrics("loss")
