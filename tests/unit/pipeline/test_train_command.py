"""`relay train`: what a run leaves behind, and that one which was interrupted ends with the same bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny.project import Project, relay

from flux2_relay.stages.train import loop

COLUMNS = ("step", "loss", "lr", "grad_norm", "sigma")


def adapter(project: Project) -> dict[str, mx.array]:
    values = mx.load(str(project.run / "adapter.safetensors"))
    assert isinstance(values, dict)
    return values


def assert_same_run(one: Project, other: Project) -> None:
    """Bit for bit: adapters, last checkpoints, metrics, previews."""
    assert one.metrics(*COLUMNS) == other.metrics(*COLUMNS)
    for name in ("adapter.safetensors", "checkpoints/000006/optimizer.safetensors", "previews/000006-00.safetensors"):
        values, expected = mx.load(str(one.run / name)), mx.load(str(other.run / name))
        assert isinstance(values, dict)
        assert isinstance(expected, dict)
        assert values.keys() == expected.keys()
        assert all(mx.array_equal(values[key], expected[key]) for key in expected), name
    previews = [{path.name for path in (p.run / "previews").glob("*.safetensors")} for p in (one, other)]
    assert previews[0] == previews[1]


@pytest.fixture(scope="module")
def trained(encoded_store: Path, dev: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of six steps without a break; tests add nothing to it but pictures of its previews."""
    mx.disable_compile()
    project = Project(tmp_path_factory.mktemp("trained"), dev, pictures).write()
    shutil.copytree(encoded_store, project.store)
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    return project


def test_a_run_leaves_what_the_contract_names(trained: Project) -> None:
    metrics = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    keys = {"step", "loss", "lr", "grad_norm", "sigma", "seconds", "wait_seconds", "peak_bytes"}
    assert [line["step"] for line in metrics] == list(range(1, 7))
    assert all(set(line) == keys and len(line["sigma"]) == 2 for line in metrics)
    assert sorted(path.name for path in (trained.run / "checkpoints").iterdir()) == ["000002", "000004", "000006"]
    previews = sorted(path.name for path in (trained.run / "previews").glob("*.safetensors"))
    assert previews == ["000000-00.safetensors", "000006-00.safetensors"]
    values = adapter(trained)
    assert len(values) == 2 * (2 * 8 + 2 * 2)
    assert values["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (2, 64)
    assert any(value.any() for name, value in values.items() if "lora_B" in name)


def test_training_moves_the_loss_down(encoded: Callable[..., Project]) -> None:
    project = encoded(train={"steps": 30, "lr": 0.02}, previews={"every": 0}, save={"every": 30})
    assert project.relay("train").status == 0
    losses = [loss for (loss,) in project.metrics("loss")]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_a_finished_run_says_so(trained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_transformer", lambda *_, **__: pytest.fail("the transformer was loaded"))
    outcome = trained.relay("train")
    assert outcome.status == 0
    assert "is finished: 6 steps are done" in outcome.said
    assert len(trained.metrics("step")) == 6


def test_resume_never_refuses_an_existing_run(trained: Project) -> None:
    outcome = trained.relay("train", "--resume", "never")
    assert outcome.status == 2
    assert str(trained.run) in outcome.said
    assert "run.name" in outcome.said


def test_stopped_and_resumed_equals_unbroken(encoded: Callable[..., Project], trained: Project) -> None:
    broken = encoded()
    outcome = broken.relay("train", "--max-steps", 3)
    assert outcome.status == 0
    assert "3 of 6 steps done" in outcome.said
    assert sorted(path.name for path in (broken.run / "checkpoints").iterdir()) == ["000002", "000003"]
    outcome = broken.relay("train")
    assert outcome.status == 0
    assert "going on from the checkpoint of step 3" in outcome.said
    assert_same_run(broken, trained)


def test_one_step_at_a_time_equals_unbroken(encoded: Callable[..., Project], trained: Project) -> None:
    broken = encoded()
    for _ in range(6):
        assert broken.relay("train", "--max-steps", 1).status == 0
    assert_same_run(broken, trained)


def test_after_a_damaged_checkpoint_the_one_before_is_taken(encoded: Callable[..., Project], trained: Project) -> None:
    broken = encoded()
    assert broken.relay("train", "--max-steps", 5).status == 0
    file = broken.run / "checkpoints/000005/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    outcome = broken.relay("train")
    assert outcome.status == 0
    assert str(file) in outcome.said
    assert "going on from the checkpoint of step 4" in outcome.said
    assert_same_run(broken, trained)


def test_lines_of_steps_that_no_checkpoint_holds_are_written_anew(
    encoded: Callable[..., Project], trained: Project
) -> None:
    """As a killed process leaves them: a line too many, and one cut off."""
    broken = encoded()
    assert broken.relay("train", "--max-steps", 2).status == 0
    with open(broken.run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 3, "loss": 99.0}) + '\n{"step": 4, "lo')
    assert broken.relay("train").status == 0
    assert_same_run(broken, trained)


def test_accumulated_passes_equal_one_large_batch(encoded: Callable[..., Project]) -> None:
    """In gradient and loss; which items are drawn differs, so the data set is one picture."""
    runs = []
    for train in ({"batch": 2, "accumulate": 1}, {"batch": 1, "accumulate": 2}):
        project = encoded(train={**train, "steps": 2, "caption_dropout": 0.0}, previews={"every": 0, "prompts": []})
        data = project.folder / "one"
        data.mkdir()
        for name in ("0.png", "0.txt"):
            shutil.copy(project.data / name, data / name)
        project = Project(project.folder, project.model, data).write(
            {"train": {**train, "steps": 2, "caption_dropout": 0.0}, "previews": {"every": 0, "prompts": []}}
        )
        assert project.relay("encode").status == 0
        assert project.relay("train").status == 0
        runs.append(project)
    first, second = ([line for (line,) in project.metrics("sigma")] for project in runs)
    assert first == second
    np.testing.assert_allclose(*([v for (v,) in project.metrics("loss")] for project in runs), rtol=1e-5)
    np.testing.assert_allclose(*([v for (v,) in project.metrics("grad_norm")] for project in runs), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"seed": 4}}, "run.seed was 3 and is 4"),
        ({"lora": {"rank": 3}}, "lora.rank"),
        ({"lora": {"targets": ["to_q"]}}, "lora.targets"),
        ({"train": {"optimizer": "lion"}}, "train.optimizer"),
    ],
)
def test_a_run_is_not_resumed_as_another(encoded: Callable[..., Project], changes: dict, said: str) -> None:
    project = encoded()
    assert project.relay("train", "--max-steps", 1).status == 0
    project.write(changes)
    outcome = project.relay("train")
    assert outcome.status == 2
    assert said in outcome.said
    assert len(project.metrics("step")) == 1


def test_other_data_is_another_run(encoded: Callable[..., Project], pictures: Path) -> None:
    project = encoded()
    data = shutil.copytree(pictures, project.folder / "data")
    project = Project(project.folder, project.model, data).write()
    assert project.relay("encode").status == 0
    assert project.relay("train", "--max-steps", 1).status == 0
    (data / "0.txt").write_text("a blue dog number 0")
    assert project.relay("encode").status == 0
    outcome = project.relay("train")
    assert outcome.status == 2
    assert "the data set" in outcome.said
    assert "run.name" in outcome.said


def test_previews_are_drawn_when_they_are_due(encoded: Callable[..., Project]) -> None:
    project = encoded(previews={"every": 2, "prompts": ["a blue dog", "a blue dog"]})
    assert project.relay("encode").status == 0
    assert project.relay("train", "--max-steps", 3).status == 0
    (project.run / "previews/000002-01.safetensors").unlink()
    assert project.relay("train").status == 0
    steps = sorted({path.name.split("-")[0] for path in (project.run / "previews").iterdir()})
    assert steps == ["000000", "000002", "000004", "000006"]


def test_training_needs_the_store_alone(encoded: Callable[..., Project], dev: Path, tmp_path: Path) -> None:
    """No pictures, no encoder, no VAE: the model's folder has a transformer and nothing else."""
    folder = tmp_path / "moving/dev"
    shutil.copytree(dev, folder)
    data = shutil.copytree(encoded().data, tmp_path / "moving/data")
    project = Project(tmp_path / "p", folder, data).write()
    assert project.relay("encode").status == 0
    for gone in (data, folder / "text_encoder", folder / "tokenizer", folder / "vae"):
        shutil.rmtree(gone)
    outcome = project.relay("train", "--max-steps", 1)
    assert outcome.status == 0, outcome.said


def test_previews_are_decoded_once(trained: Project) -> None:
    outcome = relay("decode", trained.run)
    assert outcome.status == 0, outcome.said
    assert "decoded 2 previews" in outcome.said
    names = {path.name for path in (trained.run / "previews").glob("*.png")}
    assert names == {"000000-00.png", "000006-00.png", "sheet.png"}
    assert "decoded 0 previews" in relay("decode", trained.run).said


@pytest.mark.parametrize(
    ("train", "lora"), [({"dtype": "bfloat16"}, {}), ({"optimizer": "lion"}, {"targets": "blocks"})]
)
def test_other_types_and_rules_run(encoded: Callable[..., Project], train: dict, lora: dict) -> None:
    project = encoded(train={**train, "steps": 2}, lora=lora, memory={"bits": 8}, save={"dtype": "bfloat16"})
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert {value.dtype for value in adapter(project).values()} == {mx.bfloat16}
    assert "8 bit" in outcome.said


def test_streamed_blocks_are_not_kept_in_the_cache_of_freed_buffers(encoded: Callable[..., Project]) -> None:
    """Their memory goes back to the system; where all is resident, temporaries are worth keeping."""
    limits = []
    for stream in ("always", "never"):
        project = encoded(memory={"stream": stream, "bits": 32}, previews={"every": 0})
        assert project.relay("train", "--max-steps", 1).status == 0
        limits.append(mx.set_cache_limit(1 << 30))
    assert limits == [1 << 26, 1 << 30]
