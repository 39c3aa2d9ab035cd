"""`relay check`: the verdict and its exit status, the training on trial, and the warning before a long run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from tiny.project import Outcome, Project

from flux2_relay.stages.encode import templates
from flux2_relay.stages.train import acceptance, loop, optimizer, trial
from flux2_relay.stages.train.acceptance import Finding

Make = Callable[..., Project]


def one_line(outcome: Outcome) -> str:
    return " ".join(outcome.said.split())


@pytest.fixture
def good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base counts as trained, whatever it is."""
    monkeypatch.setattr(acceptance, "judge", lambda losses, diagnose: Finding("loss", "yes", "as it should be"))
    monkeypatch.setattr(acceptance, "look_at_store", lambda *_: [Finding("text", "yes", "fine")])


def test_an_untrained_model_is_a_no(encoded: Make) -> None:
    project = encoded()
    before = sorted(project.folder.rglob("*"))
    outcome = project.relay("check")
    assert outcome.status == 1
    said = one_line(outcome)
    assert "verdict no" in said
    assert "loss no: loss of the base" in said
    assert "never trained" in said
    assert sorted(project.folder.rglob("*")) == before, "nothing is left behind"


def test_a_no_is_not_trained(encoded: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("it trained"))
    outcome = encoded().relay("check", "--steps", 3)
    assert outcome.status == 1
    assert "no training on trial" in outcome.said


def test_the_answer_as_json(encoded: Make) -> None:
    outcome = encoded().relay("check", "--json")
    found = json.loads(next(line for line in outcome.said.splitlines() if line.startswith("{")))
    assert found["verdict"] == "no"
    assert [finding["about"] for finding in found["findings"]] == ["text", "latents", "loss"]
    assert all(set(finding) == {"about", "level", "sentence"} for finding in found["findings"])


def test_a_training_on_trial_is_judged(encoded: Make, good: None) -> None:
    project = encoded()
    outcome = project.relay("check", "--steps", 20)
    assert outcome.status == 0, outcome.said
    said = one_line(outcome)
    assert "training yes: 20 steps" in said
    assert "held out yes: held-out loss at fixed sigmas" in said
    assert "adapter yes: all 20 modules have learned something" in said
    assert "collapse yes" in said
    assert not project.run.exists()


def test_a_training_that_runs_away_is_a_no(encoded: Make, good: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "learning_rate", lambda options, step: -0.05)  # uphill
    outcome = encoded().relay("check", "--steps", 20)
    assert outcome.status == 1, outcome.said
    said = one_line(outcome)
    assert "held out no" in said or "training no" in said


def test_an_adapter_that_learns_nothing_is_a_no(encoded: Make, good: None) -> None:
    outcome = encoded().relay("check", "--steps", 4, "--set", "train.lr=0")
    assert outcome.status == 1, outcome.said
    assert "have learned nothing" in one_line(outcome)


def test_without_a_store_it_says_what_to_do(dev: Path, pictures: Path, tmp_path: Path) -> None:
    outcome = Project(tmp_path / "p", dev, pictures).write().relay("check")
    assert outcome.status == 2
    assert "relay encode" in outcome.said


def test_captions_in_another_template_are_named(dev: Path, pictures: Path, tmp_path: Path, good: None) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    shorter = replace(templates.FAMILIES["mistral"], before="<s>[INST]")  # without the system's text
    with mock.patch.dict(templates.FAMILIES, {"mistral": shorter}):
        assert project.relay("encode").status == 0
    outcome = project.relay("check")
    assert outcome.status == 1
    assert "template no: these captions were put to the text encoder in a form" in one_line(outcome)
    assert project.relay("encode").status == 0
    assert "template" not in project.relay("check").said


# The short form before a training


def test_a_long_training_warns_of_a_model_that_does_not_fit(encoded: Make) -> None:
    outcome = encoded(train={"steps": 50}, previews={"every": 0}).relay("train", "--max-steps", 1)
    assert outcome.status == 0, outcome.said
    assert "warning: loss: loss of the base" in outcome.said
    assert "relay check" in outcome.said


def test_a_resumed_or_short_one_does_not_look(encoded: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(train={"steps": 50}, previews={"every": 0})
    assert project.relay("train", "--max-steps", 1).status == 0
    monkeypatch.setattr(acceptance, "short", lambda *_: pytest.fail("it looked"))
    assert project.relay("train", "--max-steps", 1).status == 0
    assert encoded(train={"steps": 49}, previews={"every": 0}).relay("train", "--max-steps", 1).status == 0


def test_looking_changes_nothing_about_the_training(encoded: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ("step", "loss", "grad_norm", "sigma")
    looked, blind = (encoded(train={"steps": 50}, previews={"every": 0}) for _ in range(2))
    assert looked.relay("train", "--max-steps", 3).status == 0
    monkeypatch.setattr(acceptance, "short", lambda *_: [])
    assert blind.relay("train", "--max-steps", 3).status == 0
    assert looked.metrics(*columns) == blind.metrics(*columns)


def test_what_a_trial_hears_is_kept_in_memory() -> None:
    said: list[str] = []

    class On:
        say = staticmethod(said.append)

    heard = trial.Heard(On())  # type: ignore[arg-type]
    heard.write({"loss": 1.0})
    heard.write_validation({"loss": 2.0})
    heard.rewind(0)
    heard.say("once")
    assert (heard.steps, heard.held_out, said) == ([{"loss": 1.0}], [{"loss": 2.0}], ["once"])
