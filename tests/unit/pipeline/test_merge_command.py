"""`relay merge`: the folder that it makes, and what it refuses before a weight is read."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, layouts, namings, ours
from tiny.project import Outcome, Project, relay

from flux2_relay.pipeline import merge as merging
from flux2_relay.stages import shards, spec
from flux2_relay.stages.train import mixing
from flux2_relay.stages.train.transformer import load_transformer


def adapter(model: Path, path: Path, rank: int, form: str) -> Path:
    """A file of the blocks' linears, in one of our formats' namings."""
    sizes = spec.read_transformer_spec(model / "transformer")
    of = {p: (a, 0.1 * b) for p, (a, b) in namings.pairs(sizes, rank, outer=False).items()}
    naming = next(n for n in namings.NAMINGS if n.written == form)
    values, metadata = namings.file_of(naming, of, 1.5)
    mx.save_safetensors(str(path), values, metadata)
    return path


class Given(NamedTuple):
    project: Project
    one: Path
    other: Path
    out: Path

    def merge(self, *arguments: object) -> Outcome:
        return relay("merge", "-c", self.project.config, "--adapter", self.one, "-o", self.out, *arguments)


@pytest.fixture
def given(checkpoint: Path, tmp_path: Path) -> Given:
    one = adapter(checkpoint, tmp_path / "one.safetensors", 2, "kohya")
    other = adapter(checkpoint, tmp_path / "other.safetensors", 3, "comfyui")
    return Given(Project(tmp_path / "p", checkpoint, tmp_path).write(), one, other, tmp_path / "merged")


def test_the_folder_is_the_base_with_its_adapters(given: Given) -> None:
    """Our own transformer on the folder gives what it gives with the adapters attached."""
    outcome = given.merge("--adapter", f"{given.other}=-0.25", "--dtype", "float32")
    assert outcome.status == 0, outcome.said
    sizes = spec.read_transformer_spec(given.project.model / "transformer")
    attached = ours.load(given.project.model)
    attached.adapters = mixing.mix(mixing.read_all([given.one, given.other], sizes), [1.0, -0.25])
    case = cases.draw(sizes.context_width, guidance=[2.0] if sizes.guidance else None, seed=1, sigma=(0.4,))
    base, expected = ours.velocity(ours.load(given.project.model), case), ours.velocity(attached, case)
    found = ours.velocity(load_transformer(given.out, sizes, 32), case)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected - base).max()
    index = json.loads((given.out / "model_index.json").read_text())
    assert index["_class_name"] == ("Flux2Pipeline" if sizes.guidance else "Flux2KleinPipeline")
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    assert parts == {path.name for path in given.out.iterdir() if path.is_dir()}
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (given.project.model / part).iterdir():
            assert (given.out / part / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in given.out.parent.iterdir() if path.name.startswith(".")) == []


def test_parts_are_linked_where_that_is_asked_for(given: Given) -> None:
    outcome = given.merge("--link")
    assert outcome.status == 0, outcome.said
    assert (given.out / "vae").is_symlink()
    assert not (given.out / "transformer").is_symlink()
    assert spec.from_checkpoint(given.out).transformer == spec.from_checkpoint(given.project.model).transformer
    assert {value.dtype for value in layouts.load(given.out / "transformer").values()} == {mx.bfloat16}


def test_an_index_is_kept_and_what_it_lacks_is_null(given: Given, tmp_path: Path) -> None:
    """A training machine has the transformer and the index alone."""
    model = tmp_path / "model"
    shutil.copytree(given.project.model / "transformer", model / "transformer")
    index = {"_class_name": "MyPipeline", "is_distilled": True, "vae": ["diffusers", "AutoencoderKLFlux2"]}
    index["transformer"] = ["diffusers", "Flux2Transformer2DModel"]
    (model / "model_index.json").write_text(json.dumps(index))
    outcome = given.merge("--set", f"model.path={model}")
    assert outcome.status == 0, outcome.said
    found = json.loads((given.out / "model_index.json").read_text())
    assert found["_class_name"] == "MyPipeline"
    assert found["is_distilled"] is True
    assert found["vae"] == [None, None]
    assert "not taken along" in outcome.said
    assert "vae" in outcome.said
    assert (given.out / "scheduler" / "scheduler_config.json").is_file()


def test_links_of_a_cache_become_files(given: Given, tmp_path: Path) -> None:
    model = tmp_path / "snapshot"
    for file in given.project.model.rglob("*"):
        if file.is_file():
            place = model / file.relative_to(given.project.model)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    assert given.merge("--set", f"model.path={model}").status == 0
    assert not any(path.is_symlink() for path in given.out.rglob("*"))


@pytest.mark.parametrize("text", ["x=nan", "x=strong", "nothing.safetensors", "nothing.safetensors=0.5"])
def test_wrong_adapters_are_refused(given: Given, text: str) -> None:
    outcome = given.merge("--adapter", text)
    assert outcome.status == 2
    assert text.partition("=")[0] in outcome.said
    assert not given.out.exists()


def test_an_adapter_of_another_model_is_refused_by_name(given: Given, tmp_path: Path) -> None:
    values = {f"transformer_blocks.7.attn.to_q.lora_{x}.weight": mx.zeros((2, 2)) for x in "AB"}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), values)
    outcome = given.merge("--adapter", tmp_path / "x.safetensors")
    assert outcome.status == 2
    assert "transformer_blocks.7.attn.to_q.lora_A.weight: this model has no linear" in outcome.said


def test_a_folder_that_is_there_is_not_touched(given: Given) -> None:
    given.out.mkdir()
    (given.out / "mine").write_text("mine")
    outcome = given.merge()
    assert outcome.status == 2
    assert "is there already" in outcome.said
    assert os.listdir(given.out) == ["mine"]


def test_a_disk_that_is_too_small_is_told_beforehand(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 1000))
    outcome = given.merge()
    assert outcome.status == 2
    assert "are free" in outcome.said


def test_nothing_is_left_of_a_merge_that_breaks_off(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    before = set(given.out.parent.iterdir())
    outcome = given.merge()
    assert outcome.status == 1
    assert "is the disk full" in outcome.said
    assert set(given.out.parent.iterdir()) == before
