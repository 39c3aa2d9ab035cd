"""The exported adapter in diffusers' hands: what it does there is what the merged weights do."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import Flux2Transformer2DModel
from oracle import adapters, reference_training
from oracle.reference import Reference
from tiny import cases, ours
from tiny.compare import assert_near, relative_error

from flux2_relay.stages.train import export
from flux2_relay.stages.train.options import LoraOptions

LIMIT = 1e-5


ADAPTERS = {
    "every linear": LoraOptions(rank=4, alpha=6.0, targets="blocks"),
    "attention": LoraOptions(rank=4, alpha=2.0, targets="attention"),
    "mixed ranks": LoraOptions(rank=3, alpha=6.0, ranks={"to_q": 5, "*.ff.*": 2}),
    "half of q, k, v": LoraOptions(rank=4, alpha=4.0, targets=("to_q", "to_v", "attn.to_out")),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_diffusers_loads_what_was_trained(reference: Reference, name: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    model, options = ours.load(reference.folder), ADAPTERS[name]
    shapes = {name: value.shape for name, value in ours.attach(model, options).items()}
    values = ours.attach(model, options, cases.adapter(shapes, seed=3))
    export.write_finished(model, path, {"note": "made by a test"})

    given = cases.draw(reference.transformer.config.joint_attention_dim, seed=4)
    base = reference_training.velocity(reference.transformer, given)
    expected = reference_training.velocity(_merged(reference, values, options.alpha), given)
    for load in (adapters.through_the_pipeline, adapters.through_the_model):
        actual = reference_training.velocity(load(reference, path), given)
        assert_near(actual, expected, LIMIT, load.__name__)
    assert_near(ours.velocity(model, given), expected, LIMIT, "ours")
    assert relative_error(expected, base) > 200 * LIMIT, "the adapter does too little to show a wrong strength"


def test_an_adapter_of_step_0_changes_nothing(reference: Reference, tmp_path: Path) -> None:
    path, model = tmp_path / "adapter.safetensors", ours.load(reference.folder)
    ours.attach(model, ADAPTERS["every linear"])
    export.write_finished(model, path, {})
    given = cases.draw(reference.transformer.config.joint_attention_dim, seed=4)
    expected = reference_training.velocity(reference.transformer, given)
    loaded = adapters.through_the_pipeline(reference, path)
    assert loaded.peft_config, "nothing was loaded"
    assert_near(reference_training.velocity(loaded, given), expected, 1e-6)


def _merged(reference: Reference, values: dict, alpha: float) -> Flux2Transformer2DModel:
    """W + alpha / rank B A, formed in float64."""
    updates = {}
    for name in {name.rsplit(".lora_", 1)[0] for name in values}:
        a, b = (values[f"{name}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        updates[name] = alpha / len(a) * b @ a
    return adapters.merged(reference, updates)
