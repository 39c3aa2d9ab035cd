"""A merged folder in diffusers' hands: the pipeline loads, and its transformer is the one merged by hand."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from oracle import adapters, reference_training
from oracle.reference import Reference
from tiny import layouts, model, namings
from tiny.project import relay

from flux2_relay.stages.train.adapter_formats import FORMATS
from flux2_relay.stages.train.export import write
from flux2_relay.stages.train.updates import Factors

LIMIT = 2e-5  # of the change of the output
SCALE = 1.5


def small_adapter(reference: Reference, path: Path, rank: int, form: str) -> dict[str, np.ndarray]:
    """An adapter's file, and what it stands for."""
    spec = adapters.spec_of(reference)
    of = {p: (a, 0.05 * b / a.shape[1] ** 0.5) for p, (a, b) in namings.pairs(spec, rank, outer=False).items()}
    write(path, {p: Factors(a, b, SCALE) for p, (a, b) in of.items()}, spec, FORMATS[form], {}, mx.float32)
    return {p: SCALE * np.array(b).astype(np.float64) @ np.array(a).astype(np.float64) for p, (a, b) in of.items()}


def merged(reference: Reference, base: Path, tmp_path: Path, *arguments: object) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder that `relay merge` makes of two adapters, and the sum that they stand for."""
    one = small_adapter(reference, tmp_path / "one.safetensors", 4, "kohya")
    other = small_adapter(reference, tmp_path / "other.safetensors", 3, "diffusers")
    config, out = model.write_config(tmp_path / "c.yaml", base, tmp_path), tmp_path / "merged"
    files = ["--adapter", f"{tmp_path / 'one.safetensors'}=0.5", "--adapter", tmp_path / "other.safetensors"]
    outcome = relay("merge", "-c", config, *files, "-o", out, *arguments)
    assert outcome.status == 0, outcome.said
    return out, {path: 0.5 * one[path] + other[path] for path in one}


def assert_merged(reference: Reference, actual: Flux2Transformer2DModel, updates: dict, limit: float) -> None:
    given = adapters.case(reference)
    models = reference.transformer, adapters.merged(reference, updates), actual.eval()
    before, expected, found = (reference_training.velocity(m, given) for m in models)
    assert adapters.error_of_change(found, expected, before) <= limit


@pytest.mark.parametrize("link", [False, True])
def test_the_pipeline_loads_with_the_merged_transformer(reference: Reference, tmp_path: Path, link: bool) -> None:
    out, updates = merged(reference, reference.folder, tmp_path, "--dtype", "float32", *(["--link"] if link else []))
    of_class = Flux2KleinPipeline if reference.is_klein else Flux2Pipeline
    # The parts that read captions need packages which the oracle does without.
    pipeline = of_class.from_pretrained(out, text_encoder=None, tokenizer=None, dtype=torch.float32)
    assert_merged(reference, pipeline.transformer, updates, LIMIT)
    assert pipeline.vae.config.block_out_channels == reference.vae.config.block_out_channels
    assert (out / "text_encoder" / "config.json").is_file()


def test_a_single_file_becomes_a_folder(reference: Reference, tmp_path: Path) -> None:
    """BFL's names: the config is made, and a pipeline that is given the rest loads."""
    values = {name: mx.array(value.numpy()) for name, value in reference.transformer.state_dict().items()}
    base = layouts.save(tmp_path / "alone" / "flux2.safetensors", layouts.bfl_transformer(values))
    out, updates = merged(reference, base, tmp_path, "--dtype", "float32")
    of_class = Flux2KleinPipeline if reference.is_klein else Flux2Pipeline
    rest = {"text_encoder": None, "tokenizer": None, "vae": reference.vae}
    pipeline = of_class.from_pretrained(out, dtype=torch.float32, **rest)
    assert_merged(reference, pipeline.transformer, updates, LIMIT)
    known = Flux2Transformer2DModel.load_config(reference.folder / "transformer")
    found = Flux2Transformer2DModel.load_config(out / "transformer")
    assert {k: v for k, v in found.items() if known[k] != v}.keys() <= {"_diffusers_version", "_name_or_path"}


def test_bfloat16_is_rounded_once(reference: Reference, tmp_path: Path) -> None:
    out, updates = merged(reference, reference.folder, tmp_path)
    found = Flux2Transformer2DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16).state_dict()
    expected = adapters.merged(reference, updates).state_dict()
    for name, value in expected.items():
        other = found[name] != value.bfloat16()  # float32 and float64 may round to neighbours, which is rare
        assert other.float().mean() < 1e-3, name
        assert ((found[name].float() - value).abs() <= 2.0**-8 * value.abs() + 1e-6 * value.abs().max()).all(), name
