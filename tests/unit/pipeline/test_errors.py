"""What users get wrong: exit status 2, a sentence that says what, where and what to do, and nothing half done.

`relay` runs in this process, so an error that is no plain sentence fails the test as the exception it is.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import model as tiny
from tiny.project import Outcome, Project, relay

from flux2_relay.stages.encode import stage, text
from flux2_relay.stages.train import loop

Make = Callable[..., Project]


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is refused before an hour of work."""
    monkeypatch.setattr(text, "load_text_encoder", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    monkeypatch.setattr(stage.vae, "load_encoder", lambda *_, **__: pytest.fail("the VAE was loaded"))
    monkeypatch.setattr(loop, "load_transformer", lambda *_, **__: pytest.fail("the transformer was loaded"))


def refused(outcome: Outcome, *said: object) -> None:
    assert outcome.status == 2, outcome.said
    for words in said:
        assert str(words) in outcome.said
    assert "Traceback" not in outcome.said


@pytest.fixture
def fresh(dev: Path, pictures: Path, tmp_path: Path) -> Project:
    """Nothing encoded yet; model and data are the test's own."""
    model, data = shutil.copytree(dev, tmp_path / "model"), shutil.copytree(pictures, tmp_path / "data")
    return Project(tmp_path / "project", model, data).write()


# The config


@pytest.mark.parametrize("command", ["encode", "train"])
def test_a_mistyped_key_is_named_with_its_line_and_neighbour(fresh: Project, command: str) -> None:
    lines = fresh.config.read_text().replace("rank: 2", "rnak: 2").splitlines()
    fresh.config.write_text("\n".join(lines))
    line = next(number for number, text in enumerate(lines, 1) if "rnak" in text)
    refused(fresh.relay(command), f"{fresh.config}:{line}: unknown key 'lora.rnak'; did you mean 'lora.rank'?")
    assert not fresh.store.exists()


def test_every_fault_of_a_config_is_named_at_once(fresh: Project) -> None:
    fresh.write({"train": {"lr": "fast", "batch": 0}, "lora": {"targest": "blocks"}})
    refused(fresh.relay("encode"), "train.lr", "train.batch", "lora.targest")


def test_a_setting_of_the_command_line_is_checked_too(fresh: Project) -> None:
    refused(fresh.relay("train", "--set", "lora.rnak=2"), "--set", "lora.rnak", "lora.rank")


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    refused(relay("encode", "-c", tmp_path / "no.yaml"), tmp_path / "no.yaml")


def test_usage_errors_say_how_it_is_used(fresh: Project) -> None:
    refused(relay("train"), "--config")
    refused(relay("trian"), "trian")
    refused(fresh.relay("train", "--max-steps", 0), "--max-steps")
    refused(fresh.relay("train", "--resume", "perhaps"), "--resume")


# The data


def test_a_missing_caption_is_named(fresh: Project) -> None:
    (fresh.data / "1.txt").unlink()
    (fresh.data / "3.txt").unlink()
    refused(fresh.relay("encode"), fresh.data, "1.png", "3.png", "without a caption")
    assert not fresh.store.exists()


def test_an_unreadable_picture_is_named(fresh: Project) -> None:
    (fresh.data / "2.png").write_bytes(b"GIF, or so")
    refused(fresh.relay("encode"), fresh.data / "2.png")


def test_a_data_set_that_is_not_there(fresh: Project) -> None:
    shutil.rmtree(fresh.data)
    refused(fresh.relay("encode"), fresh.data)
    assert not fresh.store.exists()


# The checkpoint


@pytest.mark.parametrize("command", ["encode", "train"])
def test_a_checkpoint_of_another_model(encoded: Make, command: str) -> None:
    project = encoded(model={"name": "dev"})
    refused(project.relay(command), "model.name is 'dev'", project.model, "2 + 2 blocks, width 64")


def test_nothing_is_created_for_a_checkpoint_of_another_model(fresh: Project) -> None:
    fresh.write({"model": {"name": "klein-4b"}})
    refused(fresh.relay("encode"), "model.name")
    assert not fresh.store.exists()


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_encoder_and_a_transformer_of_two_models(fresh: Project) -> None:
    change(fresh.model / "transformer/config.json", joint_attention_dim=128)
    refused(fresh.relay("encode"), "192 channels", "128", "model")


def test_a_model_that_is_not_there(fresh: Project) -> None:
    shutil.rmtree(fresh.model)
    refused(fresh.relay("encode"), "model.path", fresh.model)
    assert not fresh.store.exists()


SENSELESS = [("transformer", "num_layers"), ("text_encoder", "flux2_taps"), ("vae", "patch_size")]


@pytest.mark.parametrize(("part", "key"), SENSELESS)
def test_a_config_of_the_checkpoint_that_makes_no_sense(fresh: Project, part: str, key: str) -> None:
    change(fresh.model / part / "config.json", **{key: "many"})
    refused(fresh.relay("encode"), fresh.model / part / "config.json", key)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_download_that_was_cut_off(fresh: Project, part: str) -> None:
    (file,) = (fresh.model / part).glob("*.safetensors")
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 100)
    refused(fresh.relay("encode"), file, "cut off")


def test_a_tokenizer_that_is_not_there(fresh: Project) -> None:
    (fresh.model / "tokenizer/tokenizer.json").unlink()
    refused(fresh.relay("encode"), fresh.model / "tokenizer", "tokenizer.json")


def test_a_transformer_that_was_cut_off(encoded: Make, dev: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.undo()
    project = encoded()
    folder = shutil.copytree(dev, tmp_path / "cut")
    (file,) = (folder / "transformer").glob("*.safetensors")
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 100)
    project = Project(project.folder, folder, project.data).write()
    assert project.relay("encode").status == 0  # it does not read the transformer
    refused(project.relay("train"), file, "cut off")


# The store


def test_training_before_encoding(fresh: Project) -> None:
    refused(fresh.relay("train"), fresh.store, "relay encode")
    assert not fresh.run.exists()
    assert not fresh.store.exists()


def test_training_on_what_was_not_encoded_for_it(encoded: Make) -> None:
    project = encoded(encode={"bits": 8})
    refused(project.relay("train"), project.store, "encode.bits (32 there, 8 here)", "relay encode")
    assert not project.run.exists()


def test_training_with_an_entry_missing(encoded: Make) -> None:
    project = encoded()
    lost = next((project.store / "latents").glob("[0-9a-f]*"))
    shutil.rmtree(lost)
    refused(project.relay("train"), project.store, "1 of latents", "relay encode")
    assert not project.run.exists()


@pytest.mark.parametrize("command", ["encode", "train"])
def test_a_store_of_another_version(encoded: Make, command: str) -> None:
    project = encoded()
    root = json.loads((project.store / "zarr.json").read_text())
    root["attributes"]["version"] = 99
    (project.store / "zarr.json").write_text(json.dumps(root))
    refused(project.relay(command), project.store, "version", "99")


@pytest.mark.parametrize("command", ["encode", "train"])
def test_a_folder_that_is_no_store(fresh: Project, command: str) -> None:
    fresh.store.mkdir()
    (fresh.store / "holiday.jpg").write_bytes(b"mine")
    refused(fresh.relay(command), fresh.store)
    assert os.listdir(fresh.store) == ["holiday.jpg"]


def test_an_encoder_swapped_after_encoding(encoded: Make, dev: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.undo()
    project = Project(tmp_path / "p", shutil.copytree(dev, tmp_path / "own"), encoded().data).write()
    assert project.relay("encode").status == 0
    file = project.model / "text_encoder/model.safetensors"
    values = mx.load(str(file))
    assert isinstance(values, dict)
    name = "language_model.model.layers.2.mlp.down_proj.weight"
    mx.eval(values)
    values[name] = values[name] + 1e-6
    file.unlink()
    tiny.save(file, values)
    refused(project.relay("train"), project.model / "text_encoder", "another text encoder", "relay encode")
    assert not (project.run / "config.yaml").exists()


# The run


def test_decoding_what_is_no_run(tmp_path: Path) -> None:
    refused(relay("decode", tmp_path / "runs/none"), tmp_path / "runs/none", "no run folder")


def test_decoding_a_run_without_previews(fresh: Project) -> None:
    fresh.run.mkdir(parents=True)
    shutil.copy(fresh.config, fresh.run / "config.yaml")
    refused(relay("decode", fresh.run), fresh.run / "previews", "previews.prompts")


def test_a_pattern_that_matches_nothing(encoded: Make, monkeypatch) -> None:
    monkeypatch.undo()
    project = encoded(lora={"targets": ["to_qq"]})
    refused(project.relay("train"), "lora.targets: 'to_qq'")


def test_help_of_every_command() -> None:
    for command in ([], ["encode"], ["train"], ["decode"], ["report"]):
        outcome = relay(*command, "--help")
        assert outcome.status == 0
        assert "Usage:" in outcome.said
