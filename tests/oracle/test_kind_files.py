"""LoKr exports in diffusers' hands, and what becomes of DoRA there: why it is refused."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from oracle import adapters, reference_training
from oracle.reference import Reference
from tiny import cases, ours

from flux2_relay.stages.train import export, lora, mixing
from flux2_relay.stages.train.adapter_formats import FORMATS
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import Transformer
from flux2_relay.stages.train.updates import Update

LIMIT = 2e-5  # of the change of the output
KINDS = {
    "a rank": LoraOptions(kind="lokr", rank=3, alpha=4.5, factor=4),
    "ranks that differ": LoraOptions(kind="lokr", rank=3, alpha=4.5, factor=4, ranks={"to_k": 2, "single*": 5}),
    "near the square root": LoraOptions(kind="lokr", rank=2, alpha=3.0, factor="auto"),
    "whole": LoraOptions(kind="lokr", rank=500, factor=8),
    "whole and of a rank": LoraOptions(kind="lokr", rank=12, alpha=6.0, factor=4),  # W2 of to_q has a side of 16
    "some of q, k and v": LoraOptions(kind="lokr", rank=3, alpha=4.5, factor=4, targets=("to_q", "add_v_proj")),
}


def trained(model: Transformer, options: LoraOptions) -> dict[str, Update]:
    """Of which nothing is zero."""
    start = ours.attach(model, options)
    values = cases.adapter({name: value.shape for name, value in start.items()}, seed=1)
    values = {name: value * (0.2 if "lokr_w1" in name else 1) for name, value in values.items()}
    values |= {name: 1.1 * value for name, value in start.items() if "magnitude" in name}
    lora.load(model, {name: mx.array(value) for name, value in values.items()})
    return export.updates_of(model)


def matrices(updates: dict[str, Update], reference: Reference) -> dict[str, np.ndarray]:
    """What is added to each weight, float64."""
    weights = {path: reference.transformer.get_parameter(f"{path}.weight").detach().numpy() for path in updates}
    return {path: np.array(u.change(mx.array(weights[path]), 0)).astype(np.float64) for path, u in updates.items()}


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_does_with_lokr_what_the_merged_weights_do(
    reference: Reference, kind: str, form: str, tmp_path: Path
) -> None:
    model, path = ours.load(reference.folder), tmp_path / "adapter.safetensors"
    updates = trained(model, KINDS[kind])
    export.write(path, updates, model.spec, FORMATS[form], {}, mx.float32)
    assert adapters.outcome(reference, path, matrices(updates, reference), LIMIT) == "ok"


def test_lokr_in_bfloat16_is_as_near_as_its_rounding(reference: Reference, tmp_path: Path) -> None:
    model, path = ours.load(reference.folder), tmp_path / "adapter.safetensors"
    updates = trained(model, KINDS["a rank"])
    export.write(path, updates, model.spec, FORMATS["diffusers"], {}, mx.bfloat16)
    assert adapters.outcome(reference, path, matrices(updates, reference), 2e-2) == "ok"


def test_diffusers_draws_with_half_a_dora(reference: Reference, tmp_path: Path) -> None:
    """What `--format comfyui` writes is read without an error, and wrongly: the reason for refusing the others."""
    model, path = ours.load(reference.folder), tmp_path / "adapter.safetensors"
    updates = trained(model, LoraOptions(kind="dora", rank=3, alpha=4.5))
    base = {p: mx.array(reference.transformer.get_parameter(f"{p}.weight").detach().numpy()) for p in updates}
    ready = export.suited(updates, FORMATS["comfyui"], lambda module: iter([base[module]]))
    export.write(path, ready, model.spec, FORMATS["comfyui"], {}, mx.float32)
    assert adapters.outcome(reference, path, matrices(updates, reference), LIMIT) == "wrong"


@pytest.mark.parametrize(
    "options", [KINDS["a rank"], LoraOptions(kind="dora", rank=3, alpha=4.5)], ids=["lokr", "dora"]
)
def test_merged_in_diffusers_is_drawn_here(reference: Reference, options: LoraOptions) -> None:
    model = ours.load(reference.folder)
    updates, given = trained(model, options), adapters.case(reference)
    merged = adapters.merged(reference, matrices(updates, reference))
    expected, before = (reference_training.velocity(m, given) for m in (merged, reference.transformer))
    for of in (model.adapters, mixing.mix([mixing.measured(updates, model)], [1.0])):
        model.adapters = of
        assert adapters.error_of_change(ours.velocity(model, given), expected, before) < LIMIT
