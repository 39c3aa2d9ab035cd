"""`relay models`, and the other commands on models that are not one folder in the diffusers layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import layouts, model
from tiny.project import Outcome, Project, relay

from flux2_relay import cache
from flux2_relay.stages import spec
from flux2_relay.stages.catalogue import CATALOGUE, SOURCES
from flux2_relay.stages.encode import stage
from flux2_relay.stages.encode.layout import text_layout


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def parsed(outcome: Outcome) -> dict:
    assert outcome.status == 0, outcome.said
    return json.loads(outcome.said)


def test_the_catalogue_says_what_is_here(dev: Path, no_hub: Path) -> None:
    folder = no_hub / "models--black-forest-labs--FLUX.2-dev/snapshots/abc"
    shutil.copytree(dev, folder, ignore=lambda _, found: [name for name in found if name == "vae"])
    told = parsed(relay("models", "--json"))
    models = {row["name"]: row for row in told["models"]}
    assert set(models) == set(CATALOGUE) == set(SOURCES)
    assert (models["dev"]["snapshot"], models["dev"]["missing"]) == (str(folder), ["vae"])
    assert models["dev"]["parameters"] == 32_223_281_152
    assert models["klein-9b"]["parameters"] == 9_078_581_248
    assert models["klein-4b"]["snapshot"] is None
    assert told["hugging_face_cache"] == str(no_hub)
    said = relay("models").said
    assert "without vae" in said
    assert "hf download black-forest-labs/FLUX.2-klein-base-4B --exclude flux-2-klein-base-4b.safetensors" in said


def single_file(dev: Path, folder: Path) -> Path:
    return layouts.save(folder / "x.safetensors", layouts.bfl_transformer(layouts.load(dev / "transformer")))


def test_a_models_files_are_listed_with_what_is_missing(dev: Path, tmp_path: Path) -> None:
    file = single_file(dev, tmp_path)
    shutil.copytree(dev / "text_encoder", tmp_path / "text_encoder")
    told = parsed(relay("models", "--path", file, "--json"))
    parts = {row["part"]: row for row in told["parts"]}
    assert (parts["transformer"]["layout"], parts["transformer"]["files"]) == ("BFL", ["x.safetensors"])
    assert parts["transformer"]["bytes"] == file.stat().st_size
    assert parts["text_encoder"]["place"] == str(tmp_path / "text_encoder")
    assert parts["vae"]["download"].startswith("download the folder vae/ (or ae.safetensors")
    assert parts["tokenizer"]["download"].startswith("download tokenizer/tokenizer.json")
    said = relay("models", "--path", file).said
    assert f"{tmp_path / 'vae'} (missing)" in said
    assert "vae: download the folder vae/" in said


def test_a_config_names_its_model(dev: Path, pictures: Path, tmp_path: Path) -> None:
    packed = layouts.pack_encoder(dev / "text_encoder", tmp_path / "packed", {"bits": 8, "group_size": 32})
    changes = {"model": {"path": str(dev), "text_encoder": str(packed)}}
    project = Project(tmp_path / "p", dev, pictures).write(changes)
    parts = {row["part"]: row for row in parsed(project.relay("models", "--json"))["parts"]}
    assert parts["text_encoder"]["layout"] == "MLX, affine 8 bit, groups of 32"
    assert not any(row["fault"] or row["download"] for row in parts.values())
    project.write({"model": {"path": str(single_file(dev, tmp_path / "y")), "name": "klein-9b"}})
    told = parsed(project.relay("models", "--json"))
    assert told["model"] == "klein-9b"
    assert "hf download black-forest-labs/FLUX.2-klein-9B --include 'vae/*'" in told["parts"][3]["download"]


def test_files_that_cannot_be_used_say_why(dev: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev, tmp_path / "dev")
    values = layouts.load(folder / "vae")
    del values["encoder.conv_out.weight"]
    layouts.save(folder / "vae/diffusion_pytorch_model.safetensors", values)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    parts = {row["part"]: row for row in parsed(relay("models", "--path", folder, "--json"))["parts"]}
    assert "encoder.conv_out.weight is missing" in parts["vae"]["fault"]
    assert "cut off" in parts["transformer"]["fault"]
    assert parts["text_encoder"]["fault"] is None
    assert f"{folder / 'vae'} (cannot be used)" in relay("models", "--path", folder).said


def test_one_model_at_a_time(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    assert project.relay("models", "--path", dev).status == 2
    assert relay("models", "--path", tmp_path / "nowhere").status == 2


@pytest.fixture
def single(dev: Path, pictures: Path, tmp_path: Path) -> Callable[..., Project]:
    """A project whose model is BFL's files and whose encoder is named apart."""

    def make(encoder: Path, **keys: object) -> Project:
        file = single_file(dev, tmp_path / "single")
        layouts.save(tmp_path / "single/ae.safetensors", layouts.bfl_vae(layouts.load(dev / "vae")))
        shutil.copy(dev / "vae/config.json", tmp_path / "single")
        section = {"path": str(file), "text_encoder": str(encoder), "tokenizer": str(dev), **keys}
        return Project(tmp_path / "p", file, pictures).write({"model": section})

    return make


def test_single_files_fill_a_store_with_the_same_keys(single: Callable, dev: Path, encoded_store: Path) -> None:
    """So nothing is encoded twice when a user changes from one layout to another."""
    project = single(dev / "text_encoder")
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    for kind in ("text", "latents"):
        expected, found = (set(cache.open(str(path), "r").keys(kind)) for path in (encoded_store, project.store))
        assert found == expected
    outcome = project.relay("train", "--max-steps", 1)
    assert outcome.status == 0, outcome.said


def test_a_packed_encoder_is_said_to_keep_its_bits(
    single: Callable, dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(stage, "text_layout", lambda *given: asked.append(given[3]) or text_layout(*given))
    packed = layouts.pack_encoder(dev / "text_encoder", tmp_path / "packed", {"bits": 4, "group_size": 32})
    project = single(packed)
    outcome = project.relay("encode", "--set", "encode.bits=8")
    assert outcome.status == 0, outcome.said
    assert "is packed already (affine 4 bit, groups of 32)" in outcome.said
    assert "only the arithmetic follows, bfloat16" in outcome.said
    assert "text encoder (3 of 5 layers, affine 4 bit, groups of 32, resident)" in outcome.said
    assert [tensors.source for tensors in asked] == [packed], "memory is planned for what the file has packed"
    store = cache.open(str(project.store), "r")
    key = store.read("text", next(iter(store.keys("text")))).attributes["key"]
    assert key["quant"] == {"bits": 4, "group": 32, "mode": "affine", "source": "file"}
    assert "0 captions and 0 images" in project.relay("encode", "--set", "encode.bits=8").said


def test_missing_parts_are_named_before_anything_is_read(dev: Path, pictures: Path, tmp_path: Path) -> None:
    file = single_file(dev, tmp_path / "single")
    project = Project(tmp_path / "p", file, pictures).write({"model": {"path": str(file), "name": "dev"}})
    outcome = project.relay("encode")
    assert outcome.status == 2
    for part in ("text_encoder", "tokenizer", "vae"):
        assert f"hf download black-forest-labs/FLUX.2-dev --include '{part}/*'" in outcome.said


def test_the_named_model_says_whether_a_single_file_is_distilled(tmp_path: Path, klein: Path) -> None:
    file = single_file(klein, tmp_path)
    assert not spec.is_distilled(file, "auto")
    assert spec.is_distilled(file, "klein-4b")
    assert not spec.is_distilled(klein, "klein-4b"), "a folder says it of itself"


def test_a_model_of_a_known_size_is_named(dev: Path, tmp_path: Path) -> None:
    (transformer, _), folder = CATALOGUE["klein-base-4b"], tmp_path / "klein"
    shutil.copytree(dev, folder)
    config = {
        "num_layers": transformer.double_blocks,
        "num_single_layers": transformer.single_blocks,
        "num_attention_heads": transformer.heads,
        "attention_head_dim": transformer.head_dim,
        "joint_attention_dim": transformer.context_width,
        "guidance_embeds": False,
    }
    (folder / "transformer/config.json").write_text(json.dumps(config))
    model.save(folder / "transformer/diffusion_pytorch_model.safetensors", {"x": mx.zeros(1)})
    said = relay("models", "--path", folder).said
    assert f"{folder}: klein-base-4b" in said
    assert "expected one tensor ending in" in said
