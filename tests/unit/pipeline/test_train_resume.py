"""Resuming: what may change in the config and what may not, the mean of the adapter, the best checkpoint."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny.project import Project

from flux2_relay.pipeline.config import flat, load_config
from flux2_relay.stages import blas
from flux2_relay.stages.train import checkpoint, resume, running, validation

COLUMNS = ("step", "loss", "lr", "grad_norm", "sigma")
QUIET = {"every": 0, "prompts": ["a blue dog"]}


def begun(encoded: Callable[..., Project], **changes: dict) -> Project:
    project = encoded(**{"previews": QUIET, **changes})
    outcome = project.relay("train", "--max-steps", 2)
    assert outcome.status == 0, outcome.said
    return project


def again(project: Project, **changes: dict):
    project.write({"previews": QUIET, **changes})
    return project.relay("train", "--max-steps", 1)


def state(project: Project, step: int) -> dict:
    return json.loads((project.run / f"checkpoints/{step:06d}/state.json").read_text())


def validations(project: Project) -> list[dict]:
    return [json.loads(line) for line in (project.run / "validation.jsonl").read_text().splitlines()]


def tensors(path: Path) -> dict[str, mx.array]:
    values = mx.load(str(path))
    assert isinstance(values, dict)
    return values


def assert_equal(one: Path, other: Path) -> None:
    values, expected = tensors(one), tensors(other)
    assert values.keys() == expected.keys()
    assert all(mx.array_equal(values[name], expected[name]) for name in expected)


# A config that changed

ALLOWED = {
    "train.steps was 6 and is 8": {"train": {"steps": 8}},
    "save.every was 2 and is 5": {"save": {"every": 5}},
    "validation.every was 100 and is 7": {"validation": {"every": 7}},
    "previews.seed was 42 and is 7": {"previews": {**QUIET, "seed": 7}},
    "train.lr was 0.001 and is 0.002": {"train": {"lr": 0.002}},
    "train.batch was 2 and is 1": {"train": {"batch": 1}},
    "train.sigma was flux2_shift and is uniform": {"train": {"sigma": "uniform"}},
    "train.ema was null and is 0.9": {"train": {"ema": 0.9}},
}


@pytest.mark.parametrize("said", ALLOWED)
def test_these_may_change_and_are_told(encoded: Callable[..., Project], said: str) -> None:
    project = begun(encoded)
    outcome = again(project, **ALLOWED[said])
    assert outcome.status == 0, outcome.said
    assert said in outcome.said
    assert ("holds from here on" in outcome.said) == (said.startswith("train.") and "steps" not in said)
    assert said in (project.run / "log.txt").read_text()
    assert len(project.metrics("step")) == 3
    assert outcome.said.count("changed since") == 1


REFUSED = {
    "run.seed was 3 and is 4": {"run": {"seed": 4}},
    "lora.rank was 2 and is 3": {"lora": {"rank": 3}},
    "lora.alpha was 16.0 and is 4.0": {"lora": {"alpha": 4}},
    'lora.targets was attention and is ["to_q"]': {"lora": {"targets": ["to_q"]}},
    "lora.dropout was 0.0 and is 0.5": {"lora": {"dropout": 0.5}},
    "train.optimizer was adamw and is lion": {"train": {"optimizer": "lion"}},
    "validation.fraction was 0.0 and is 0.2": {"validation": {"fraction": 0.2}},
}


def test_what_makes_another_run_is_refused_all_at_once(encoded: Callable[..., Project]) -> None:
    project = begun(encoded)
    before = (project.run / "config.yaml").read_bytes()
    for said, changes in REFUSED.items():
        outcome = again(project, **changes)
        assert outcome.status == 2, said
        assert said in outcome.said
        assert "loaded" not in outcome.said  # nothing was read for it
    everything: dict[str, dict] = {}
    for changes in REFUSED.values():
        for section, keys in changes.items():
            everything[section] = {**everything.get(section, {}), **keys}
    outcome = again(project, **everything)
    assert all(said in outcome.said for said in REFUSED)
    assert (project.run / "config.yaml").read_bytes() == before
    assert len(project.metrics("step")) == 2


def test_prompts_may_come_and_go(encoded: Callable[..., Project]) -> None:
    """They are another set in the store, but the same data."""
    project = begun(encoded)
    project.write({"previews": {**QUIET, "prompts": ["a red fox in the snow"]}})
    assert project.relay("encode").status == 0
    outcome = project.relay("train", "--max-steps", 1)
    assert outcome.status == 0, outcome.said
    assert "previews.prompts was" in outcome.said


def test_a_moved_run_goes_on(encoded: Callable[..., Project]) -> None:
    project = begun(encoded)
    shutil.move(project.run, project.folder / "elsewhere/tiny")
    outcome = again(project, run={"dir": str(project.folder / "elsewhere")})
    assert outcome.status == 0
    assert "going on from the checkpoint of step 2" in outcome.said
    assert "run.dir was" in outcome.said


def test_no_key_is_left_to_chance(dev: Path, pictures: Path, tmp_path: Path) -> None:
    """What is neither refused nor free holds from here on: the keys of `train`, and where the model lies."""
    keys = list(flat(load_config(Project(tmp_path, dev, pictures).write().config)))
    others = [key for key in keys if not resume._is_among(key, resume._FREE + resume._REFUSED)]
    of_train = {key for key in keys if key.startswith("train.")}
    assert set(others) == of_train - {"train.steps", "train.optimizer"} | {"model.path"}
    assert all(any(resume._is_among(key, (name,)) for key in keys) for name in resume._FREE + resume._REFUSED)


def test_a_run_of_an_older_release_goes_on(encoded: Callable[..., Project]) -> None:
    """Keys that its checkpoint does not know are not compared."""
    project = begun(encoded)
    file = project.run / "checkpoints/000002/state.json"
    known = json.loads(file.read_text())
    known["config"] = {"train.lr": 0.001}
    file.write_text(json.dumps(known))
    (file.parent / checkpoint.SUMS).unlink()
    outcome = again(project)
    assert outcome.status == 0
    assert "changed since" not in outcome.said


def test_the_threads_of_the_blas_are_remembered(
    encoded: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = begun(encoded)
    assert state(project, 2)["blas_threads"] == blas.threads()
    assert "the BLAS has" not in again(project).said
    monkeypatch.setattr(blas, "threads", lambda: 77)
    outcome = again(project)
    assert outcome.status == 0
    assert "the BLAS has 77 threads" in outcome.said


def test_the_config_of_a_checkpoint_is_the_whole_config(encoded: Callable[..., Project]) -> None:
    project = begun(encoded)
    config = load_config(project.config)
    known = state(project, 2)["config"]
    assert known["train.betas"] == list(config.train.betas)
    assert known["run.seed"] == 3
    assert {key.split(".")[0] for key in known} == set(type(config).__slots__) - {"sweep"}  # one run has none


# The mean of the adapter


def test_the_mean_is_saved_beside_and_exact_under_resume(encoded: Callable[..., Project]) -> None:
    whole, broken = (
        encoded(previews=QUIET, train={"ema": 0.6, "lr": 0.01}, save={"keep": 9, "every": 1}) for _ in "ab"
    )
    assert whole.relay("train").status == 0
    for _ in range(3):
        assert broken.relay("train", "--max-steps", 2).status == 0
    assert_equal(whole.run / "adapter_ema.safetensors", broken.run / "adapter_ema.safetensors")
    assert_equal(whole.run / "checkpoints/000006/ema.safetensors", broken.run / "checkpoints/000006/ema.safetensors")
    name = "transformer_blocks.0.attn.to_q.lora_B.weight"
    mean = np.zeros((64, 2))
    for step in range(6):
        share = min(0.6, (1 + step) / (10 + step))
        now = np.array(tensors(whole.run / f"checkpoints/{step + 1:06d}/adapter.safetensors")[name])
        mean = share * mean + (1 - share) * now
    found = np.array(tensors(whole.run / "checkpoints/000006/ema.safetensors")[name])
    np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-9)
    folded = np.array(tensors(whole.run / "adapter_ema.safetensors")[f"transformer.{name}"])
    np.testing.assert_allclose(folded, 8 * mean, rtol=1e-5, atol=1e-9)  # alpha / rank


def test_an_adapter_to_start_from_is_started_from_once(encoded: Callable[..., Project]) -> None:
    """A resumed run goes on from its checkpoint, and the mean begins with that adapter, too."""
    first = begun(encoded, train={"lr": 0.01})
    init = first.run / "adapter.safetensors"
    whole, broken = (
        encoded(
            previews=QUIET,
            train={"steps": 3, "lr": 0.01, "ema": 0.9},
            lora={"init": str(init), "rank": 2},
            save={"every": 1, "keep": 9, "dtype": "float32"},
        )
        for _ in "ab"
    )
    assert whole.relay("train").status == 0
    for _ in range(3):
        assert broken.relay("train", "--max-steps", 1).status == 0
    assert broken.metrics(*COLUMNS) == whole.metrics(*COLUMNS)
    for name in ("adapter.safetensors", "adapter_ema.safetensors"):
        assert_equal(broken.run / name, whole.run / name)
    name = "transformer_blocks.0.attn.to_q.lora_B.weight"
    begins = np.array(tensors(first.run / "checkpoints/000002/adapter.safetensors")[name])
    after = np.array(tensors(whole.run / "checkpoints/000001/adapter.safetensors")[name])
    mean = np.array(tensors(whole.run / "checkpoints/000001/ema.safetensors")[name])
    np.testing.assert_allclose(mean, 0.1 * begins + 0.9 * after, rtol=1e-2, atol=1e-5)
    assert not np.allclose(mean, 0.9 * after, rtol=1e-2, atol=1e-5)


def test_without_a_decay_there_is_no_mean(encoded: Callable[..., Project]) -> None:
    project = begun(encoded)
    assert not (project.run / "adapter_ema.safetensors").exists()
    assert not (project.run / "checkpoints/000002/ema.safetensors").exists()


# All at once

EVERYTHING = {
    "lora": {"rank": 2, "targets": ["to_q", "single*"], "dropout": 0.3},
    "validation": {"fraction": 0.2, "every": 2},
    "save": {"every": 3, "keep": 9, "dtype": "float32"},
}


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "lion", "prodigy"])
def test_a_broken_run_of_every_rule_equals_the_unbroken_one(encoded: Callable[..., Project], rule: str) -> None:
    train = {"optimizer": rule, "lr": 1.0 if rule == "prodigy" else 0.01, "steps": 5, "schedule": "cosine", "ema": 0.9}
    train |= {"warmup": 2, "batch": 1, "accumulate": 2}
    whole, broken = (encoded(previews=QUIET, **EVERYTHING, train=train) for _ in "ab")
    assert whole.relay("train").status == 0
    for count in (1, 2, 2):
        assert broken.relay("train", "--max-steps", count).status == 0
    assert broken.metrics(*COLUMNS) == whole.metrics(*COLUMNS)
    assert validations(broken) == validations(whole)
    files = [f"checkpoints/000005/{name}.safetensors" for name in ("adapter", "optimizer", "ema")]
    for name in (*files, "adapter.safetensors", "adapter_ema.safetensors"):
        assert_equal(broken.run / name, whole.run / name)
    assert (broken.run / "checkpoints/best").read_text() == (whole.run / "checkpoints/best").read_text()


# Held-out pictures


def held(encoded: Callable[..., Project], **train: object) -> Project:
    return encoded(
        previews=QUIET,
        validation={"fraction": 0.2, "every": 2},
        train={"lr": 0.01, **train},
        save={"every": 99, "keep": 1},
    )


def test_the_held_out_loss_is_taken_and_its_best_checkpoint_kept(encoded: Callable[..., Project]) -> None:
    project = held(encoded, steps=7)
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    found = validations(project)
    assert [line["step"] for line in found] == [0, 2, 4, 6, 7]
    assert all(line["sigma"] == [0.1, 0.3, 0.5, 0.7, 0.9] and line["pictures"] >= 1 for line in found)
    assert all(line["loss"] == pytest.approx(np.mean(line["loss_by_sigma"])) for line in found)
    best = min(found[1:], key=lambda line: line["loss"])["step"]
    folder = project.run / "checkpoints"
    assert (folder / "best").read_text() == f"{best:06d}\n"
    assert {path.name for path in checkpoint.saved(folder)} == {f"{best:06d}", "000007"}
    assert checkpoint.best(folder) == folder / f"{best:06d}"


def test_held_out_losses_are_exact_under_resume(encoded: Callable[..., Project]) -> None:
    whole, broken = held(encoded), held(encoded)
    assert whole.relay("train").status == 0
    for _ in range(6):
        assert broken.relay("train", "--max-steps", 1).status == 0
    assert validations(whole) == validations(broken)
    assert (whole.run / "checkpoints/best").read_text() == (broken.run / "checkpoints/best").read_text()


def test_lines_behind_the_checkpoint_are_written_anew(encoded: Callable[..., Project]) -> None:
    project = held(encoded)
    assert project.relay("train", "--max-steps", 2).status == 0
    with open(project.run / "validation.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"st')
    (project.run / "checkpoints/best").write_text("000004\n")
    assert project.relay("train").status == 0
    assert [line["step"] for line in validations(project)] == [0, 2, 4, 6]
    assert max(line["loss"] for line in validations(project)) < 99


def test_held_out_pictures_are_not_trained_on(encoded: Callable[..., Project]) -> None:
    """They are not drawn, and they draw no dropout: the loss is that of the adapter as previews use it."""
    project, plain = held(encoded), encoded(previews=QUIET, train={"lr": 0.01})
    assert project.relay("train").status == 0
    assert plain.relay("train").status == 0
    assert project.metrics("loss") != plain.metrics("loss")
    dropping = encoded(
        previews=QUIET, validation={"fraction": 0.2}, lora={"dropout": 0.5, "rank": 2}, train={"lr": 0.01}
    )
    assert dropping.relay("train").status == 0
    assert validations(dropping)[0] == validations(project)[0]
    assert dropping.metrics("grad_norm") != project.metrics("grad_norm")


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Held-out losses by step: those of a tiny run fall all the way, so that the last would always be the best."""
    real, at = running.Run._validate, [0]

    def noting(run: running.Run) -> None:
        at[0] = run.done
        real(run)

    def loss(*_: object) -> validation.HeldOutLoss:
        return validation.HeldOutLoss(losses[at[0]], (losses[at[0]],) * 5, 1)

    monkeypatch.setattr(running.Run, "_validate", noting)
    monkeypatch.setattr(validation.Validation, "loss", loss)


def test_the_best_of_a_loss_that_rises_again_is_kept_and_marked(
    encoded: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untrained adapter never is it, nor a loss that is no number; saved at once though no checkpoint is due."""
    scripted(monkeypatch, {0: 0.1, 2: math.nan, 4: 1.0, 6: 2.0, 8: 3.0})
    project = held(encoded, steps=8)
    assert project.relay("train").status == 0
    folder = project.run / "checkpoints"
    assert (folder / "best").read_text() == "000004\n"
    assert [path.name for path in checkpoint.saved(folder)] == ["000004", "000008"]
    assert [line["loss"] for line in validations(project)] == [0.1, None, 1.0, 2.0, 3.0]


def test_a_resumed_run_knows_its_best(encoded: Callable[..., Project], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {0: 9.0, 2: 1.0, 4: 2.0, 6: 3.0})
    project = held(encoded)
    assert project.relay("train", "--max-steps", 3).status == 0
    mark = project.run / "checkpoints/best"
    mark.write_text("000006\n")  # of a step that no checkpoint holds
    assert project.relay("train").status == 0
    assert mark.read_text() == "000002\n"
    assert checkpoint.best(mark.parent) == mark.parent / "000002"


def test_held_out_noise_is_one_for_each_picture_and_sigma_and_always_the_same(
    encoded: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    noises: list[bytes] = []

    def loss(model: object, batch: object, sigma: object, noise: mx.array, guidance: object) -> float:
        noises.append(np.array(noise).tobytes())
        return 1.0

    monkeypatch.setattr(validation, "loss_alone", loss)
    project = encoded(previews=QUIET, validation={"fraction": 0.3, "every": 2}, train={"steps": 2})
    assert project.relay("train").status == 0
    pictures = validations(project)[0]["pictures"]
    before, after = noises[: 5 * pictures], noises[5 * pictures :]
    assert pictures > 1
    assert len(set(before)) == 5 * pictures
    assert before == after
