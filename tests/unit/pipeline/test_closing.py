"""The last line of each stage: what, how long, peak beside plan, and a next command that works."""

import io
import json
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from tiny.project import Project, relay

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import closing
from flux2_relay.pipeline.report_metrics import duration
from flux2_relay.pipeline.run_folder import RunFolder, refuse_existing
from flux2_relay.stages import one_model

PEAK = r"in \d+\.?\d* s, peak [\d.]+ [kMG]?B"

Turns = list[one_model.Turn]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    found: Turns = [turn("an earlier one", 10**12, None)]
    monkeypatch.setattr(one_model, "turns", found)
    return found


def turn(name: str, peak: int, predicted: int | None) -> one_model.Turn:
    return one_model.Turn(name, 1.5, 0, peak, 0, 10**8, predicted)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs/tiny")


def last(said: str) -> str:
    return [line for line in said.splitlines() if line.strip()][-1]


def closed(stage: closing.Stage, on: io.StringIO, then: str = "relay train -c a.yaml") -> str:
    with redirect_stdout(on):
        stage.close("encoded 19 captions and 12 images", then)
    return on.getvalue()


def test_the_largest_turn_of_this_stage_is_told(turns: Turns, run: RunFolder) -> None:
    stage = closing.Stage(run)
    turns += [turn("text encoder", 6_640_000, 5_110_000), turn("VAE", 35_700_000, 36_400_000)]
    said = (
        r"encoded 19 captions and 12 images in 0\.0\d s, peak 35.7 MB \(planned 36.4 MB\); next: relay train -c a.yaml"
    )
    assert re.fullmatch(said + "\n", closed(stage, io.StringIO()))
    lines = [json.loads(line) for line in (run.path / "phases.jsonl").read_text().splitlines()]
    assert [(line["name"], line["peak_bytes"], line["predicted_bytes"]) for line in lines] == [
        ("text encoder", 6_640_000, 5_110_000),
        ("VAE", 35_700_000, 36_400_000),
    ]


def test_what_stage_one_notes_is_no_run_yet(run: RunFolder) -> None:
    run.write_phases([{"name": "VAE"}])
    refuse_existing(run.path)
    run.write({"step": 1})
    with pytest.raises(InputError, match="exists already"):
        refuse_existing(run.path)


def test_a_stage_that_loaded_nothing_has_no_peak(turns: Turns, run: RunFolder) -> None:
    assert re.fullmatch(r"encoded .* images in 0\.0\d s; next: .*\n", closed(closing.Stage(run), io.StringIO()))


def test_a_plan_of_the_whole_stage_goes_before_that_of_a_turn(turns: Turns, run: RunFolder) -> None:
    stage = closing.Stage(run, planned_bytes=60_100_000)
    turns.append(turn("transformer", 55_600_000, None))
    assert "peak 55.6 MB (planned 60.1 MB)" in closed(stage, io.StringIO())


def test_a_terminal_gets_two_lines_where_one_is_too_long(
    turns: Turns, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stage = closing.Stage(run)
    turns.append(turn("VAE", 35_700_000, 36_400_000))
    lines = closed(stage, Terminal(), "relay train -c configs/nano.yaml").splitlines()
    assert [len(line) <= 80 for line in lines] == [True, True]
    assert lines[1] == "next: relay train -c configs/nano.yaml"
    assert closing.joined("done", "next: x") == "done; next: x"


def test_each_stage_names_the_next_and_that_one_works(own: Project) -> None:
    said = own.relay("encode", "--set", "train.steps=2", "--set", "run.name=it is").said
    (command,) = re.findall(rf"encoded 7 captions and 5 images {PEAK} \(planned .*\); next: relay (.*)$", last(said))
    assert shlex.split(command)[:3] == ["train", "-c", str(own.config)]
    said = relay(*shlex.split(command), "--max-steps", 1).said
    assert re.search(rf"^1 of 2 steps done {PEAK} \(planned .*\); next: relay train ", last(said))
    for done in ("2 of 2 steps done", "decoded 2 previews"):
        command = last(said).partition("next: relay ")[2]
        said = relay(*shlex.split(command)).said
        assert re.search(rf"^{done} {PEAK} \(planned .*\); next: relay ", last(said)), said
    outcome = relay(*shlex.split(last(said).partition("next: relay ")[2]))
    assert outcome.status == 0
    assert "the report is" in outcome.said


@pytest.fixture
def own(dev: Path, pictures: Path, tmp_path: Path) -> Project:
    return Project(tmp_path / "own", dev, pictures).write()


def test_a_finished_run_says_what_comes_next(encoded: Callable[..., Project]) -> None:
    project = encoded(train={"steps": 1}, previews={"every": 0})
    assert last(project.relay("train").said).endswith(f"next: relay report {project.run}")
    assert last(project.relay("train").said) == f"next: relay report {project.run}"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.123, "0.12 s"), (9.99, "9.99 s"), (31.2, "31 s"), (725, "12 min 05 s"), (11_220, "3 h 07 min")],
)
def test_times_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said
