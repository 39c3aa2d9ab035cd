"""The exported adapter in diffusers' hands: what it does there is what the merged weights do."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from oracle import reference_training
from oracle.reference import Reference
from tiny import cases, ours
from tiny.compare import assert_near, relative_error

from flux2_relay.stages.train import export
from flux2_relay.stages.train.options import LoraOptions

LIMIT = 2e-5
RANK, ALPHA = 4, 6.0


@pytest.fixture
def written(reference: Reference, tmp_path: Path) -> tuple[Path, dict]:
    """An adapter file of our own making, and the factors it was made from."""
    options, model = LoraOptions(rank=RANK, alpha=ALPHA, targets="blocks"), ours.load(reference.folder)
    shapes = {name: value.shape for name, value in ours.attach(model, options).items()}
    values = ours.attach(model, options, cases.adapter(shapes, seed=3))
    path = tmp_path / "adapter.safetensors"
    export.write_diffusers(model, path, {"note": "made by a test"})
    return path, values


def test_diffusers_loads_what_was_trained(reference: Reference, written: tuple[Path, dict]) -> None:
    path, values = written
    given = cases.draw(reference.transformer.config.joint_attention_dim, seed=4)
    base = reference_training.velocity(reference.transformer, given)
    expected = reference_training.velocity(_merged(reference, values), given)
    for load in (_through_the_pipeline, _through_the_model):
        loaded = load(reference, path)
        actual = reference_training.velocity(loaded, given)
        # Relative to what the adapter changes, not to the velocity itself.
        assert_near(actual - base, expected - base, LIMIT, load.__name__)
    assert relative_error(base, expected) > 1e-2, "the adapter does nothing, so nothing was shown"


def _fresh(reference: Reference) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel.from_pretrained(reference.folder / "transformer", torch_dtype=torch.float32).eval()


def _through_the_model(reference: Reference, path: Path) -> Flux2Transformer2DModel:
    model = _fresh(reference)
    model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer")
    return model


def _through_the_pipeline(reference: Reference, path: Path) -> Flux2Transformer2DModel:
    of_class = Flux2KleinPipeline if reference.is_klein else Flux2Pipeline
    pipeline = of_class(None, None, None, None, _fresh(reference))
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipeline.transformer


def _merged(reference: Reference, values: dict) -> Flux2Transformer2DModel:
    """W + alpha / rank B A, formed in float64."""
    model = _fresh(reference)
    for name in {name.rsplit(".lora_", 1)[0] for name in values}:
        a, b = (torch.from_numpy(values[f"{name}.lora_{factor}.weight"]).double() for factor in "AB")
        weight = model.get_parameter(f"{name}.weight")
        weight.data = (weight.data.double() + ALPHA / RANK * b @ a).float()
    return model
