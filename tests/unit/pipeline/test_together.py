"""`relay train` on several runs: each leaves what it leaves alone, resumes alone or together, and fails alone."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny.project import Project, relay

from flux2_relay.pipeline import run_lock
from flux2_relay.stages.train import many, running

COLUMNS = ("step", "loss", "lr", "grad_norm", "sigma")
SWEEP = ("--sweep", "lora.rank=2,3", "--sweep", "train.lr=1e-3,5e-3")
NAMES = ("tiny-rank2-lr1e-3", "tiny-rank2-lr5e-3", "tiny-rank3-lr1e-3", "tiny-rank3-lr5e-3")
Make = Callable[..., Project]


def columns(folder: Path) -> list[list[Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[line[key] for key in COLUMNS] for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit."""
    assert columns(one) == columns(other)
    names = [{str(path.relative_to(run)) for path in run.rglob("*.safetensors")} for run in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        values, expected = mx.load(str(one / name)), mx.load(str(other / name))
        assert isinstance(values, dict)
        assert isinstance(expected, dict)
        assert values.keys() == expected.keys()
        assert all(mx.array_equal(values[key], expected[key]) for key in expected), name


def test_runs_of_a_sweep_are_those_that_are_trained_alone(encoded: Make) -> None:
    together, alone = encoded(), encoded()
    outcome = together.relay("train", *SWEEP)
    assert outcome.status == 0, outcome.said
    assert "memory for 4 runs together" in outcome.said
    assert "4 runs together, 24 of 24 steps done" in outcome.said
    runs = together.folder / "runs"
    every = [str(runs / name) for name in NAMES]
    assert f"next: {shlex.join(['relay', 'decode', *every])}" in outcome.said
    said = relay("decode", *every).said
    assert said.count("the contact sheet is") == 4
    assert said.endswith(f"next: {shlex.join(['relay', 'report', *every])}\n")
    assert sorted(path.name for path in runs.iterdir()) == sorted(NAMES)
    for name in NAMES:
        rank, lr = name.removeprefix("tiny-rank").split("-lr")
        said = alone.relay("train", *(f"--set=lora.rank={rank}", f"--set=train.lr={lr}", f"--set=run.name={name}"))
        assert said.status == 0, said.said
        assert_same_run(runs / name, alone.folder / "runs" / name)
        assert (runs / name / "report.html").exists()
        assert "memory for 4 runs together" in (runs / name / "log.txt").read_text()


def test_fifty_steps_of_a_section_in_the_file(encoded: Make) -> None:
    changes = {"train": {"steps": 50, "batch": 1}, "previews": {"every": 0}, "save": {"every": 50}}
    together, alone = encoded(**changes, sweep={"lora.targets": [["to_q"], "attention"]}), encoded(**changes)
    outcome = together.relay("train")
    assert outcome.status == 0, outcome.said
    for name, targets in (("tiny-targets-to_q", "[to_q]"), ("tiny-targets-attention", "attention")):
        assert alone.relay("train", f"--set=lora.targets={targets}", f"--set=run.name={name}").status == 0
        assert_same_run(together.folder / "runs" / name, alone.folder / "runs" / name)


def test_broken_off_together_they_go_on_together_or_alone(encoded: Make) -> None:
    unbroken, broken = encoded(), encoded()
    assert unbroken.relay("train", "--sweep", "lora.rank=2,3").status == 0
    outcome = broken.relay("train", "--sweep", "lora.rank=2,3", "--max-steps", 1)
    assert outcome.status == 0, outcome.said
    assert "--sweep lora.rank=2,3" in outcome.said.rpartition("next: ")[2]
    assert broken.relay("train", "--set=lora.rank=3", "--set=run.name=tiny-rank3", "--max-steps", 2).status == 0
    outcome = broken.relay("train", "--sweep", "lora.rank=2,3")
    assert outcome.status == 0, outcome.said
    runs = broken.folder / "runs"
    assert f"{runs / 'tiny-rank2'}: going on from the checkpoint of step 1" in outcome.said
    assert f"{runs / 'tiny-rank3'}: going on from the checkpoint of step 3" in outcome.said
    for name in ("tiny-rank2", "tiny-rank3"):
        expected = unbroken.folder / "runs" / name
        assert columns(runs / name) == columns(expected)
        found, wanted = (
            mx.load(str(runs / name / "adapter.safetensors")),
            mx.load(str(expected / "adapter.safetensors")),
        )
        assert isinstance(found, dict)
        assert isinstance(wanted, dict)
        assert all(mx.array_equal(found[key], wanted[key]) for key in wanted)
    outcome = broken.relay("train", "--sweep", "lora.rank=2,3")
    assert outcome.status == 0
    assert outcome.said.count("is finished") == 2


def test_a_run_that_fails_does_not_stop_the_others(encoded: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(previews={"every": 0})
    gradients = many.gradients_together

    def spoiled(steps: Any) -> Any:
        found = zip(steps, gradients(steps), strict=True)
        return [(of[0] * mx.nan if one.terms.options.lr == 5e-3 else of[0], *of[1:]) for one, of in found]

    monkeypatch.setattr(many, "gradients_together", spoiled)
    outcome = project.relay("train", "--sweep", "train.lr=1e-3,5e-3")
    assert outcome.status == 1
    runs = project.folder / "runs"
    assert (
        f"1 of 2 runs did not come to their end:\n  {runs / 'tiny-lr5e-3'}: step {running.MOST_SKIPPED}" in outcome.said
    )
    assert len(columns(runs / "tiny-lr1e-3")) == 6
    assert (runs / "tiny-lr1e-3/adapter.safetensors").exists()
    assert not (runs / "tiny-lr5e-3/adapter.safetensors").exists()


def test_several_configs_over_one_base(encoded: Make, pictures: Path) -> None:
    """Other data, prompts and lengths."""
    project = encoded()
    other = project.folder / "other.yaml"
    text = project.config.read_text().replace("name: tiny", "name: other").replace("a blue dog", "a red fox number 1")
    other.write_text(text.replace("steps: 6", "steps: 4"))
    configs = ("-c", project.config, "-c", other)
    outcome = relay("train", *configs)
    assert outcome.status == 2
    assert "relay encode" in outcome.said
    assert relay("encode", *configs).status == 0
    outcome = relay("train", *configs)
    assert outcome.status == 0, outcome.said
    assert [len(columns(project.folder / "runs" / name)) for name in ("tiny", "other")] == [6, 4]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("memory.bits=8,32", "memory.bits: 8, 32"),
        ("train.dtype=float32,bfloat16", "train.dtype"),
        ("memory.budget=1MB", "too little for this model"),
    ],
)
def test_runs_that_cannot_share_a_base_are_refused(encoded: Make, sweep: str, said: str) -> None:
    outcome = encoded().relay("train", "--sweep", sweep)
    assert outcome.status == 2
    assert said in outcome.said


def test_a_folder_in_use_refuses_all(encoded: Make) -> None:
    project = encoded()
    with run_lock.hold(project.folder / "runs/tiny-rank3"):
        outcome = project.relay("train", "--sweep", "lora.rank=2,3")
    assert outcome.status == 2
    assert "tiny-rank3 is being trained by" in outcome.said
    assert not (project.folder / "runs/tiny-rank2/metrics.jsonl").exists()


def test_never_resume_refuses_an_existing_run_of_a_sweep(encoded: Make) -> None:
    project = encoded(previews={"every": 0})
    assert project.relay("train", "--sweep", "lora.rank=2,3", "--max-steps", 1).status == 0
    outcome = project.relay("train", "--sweep", "lora.rank=3,4", "--resume", "never")
    assert outcome.status == 2
    assert "tiny-rank3 exists already" in outcome.said


def test_the_plan_says_what_each_run_takes_and_how_many_fit(encoded: Make) -> None:
    project = encoded(previews={"every": 0})
    outcome = project.relay("plan", "--json", *SWEEP)
    assert outcome.status == 0, outcome.said
    told = json.loads(outcome.said.splitlines()[-1])["together"]
    small, _, large, _ = (run["own_bytes"] for run in told["runs"])
    assert small < large
    assert [Path(run["folder"]).name for run in told["runs"]] == list(NAMES)
    assert told["room"] > 1000
    peak = told["layout"]["peak_bytes"] - told["layout"]["parts"]["kept projections"]
    fits = peak + large // 2
    assert project.relay("plan", *SWEEP, f"--set=memory.budget={fits}").status == 0
    text = project.relay("plan", *SWEEP, f"--set=memory.budget={fits}", "--set=memory.stream=never").said
    assert "0 more runs like the largest would fit" in text
    found = []
    for budget in (peak - 3 * large, 1_000_000):
        outcome = project.relay("plan", *SWEEP, f"--set=memory.budget={budget}", "--set=memory.stream=never")
        assert outcome.status == 2
        found += re.findall(r"is too little for these 4 runs together, of which (.*) would fit;", outcome.said)
    assert found == ["2", "not even one"]
