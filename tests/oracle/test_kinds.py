"""Gradients of DoRA and LoKr block by block, against peft's own on diffusers' transformer with torch's autograd."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from oracle import reference_training
from oracle.reference import Reference
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from tiny import cases, ours
from tiny.compare import assert_all_near

from flux2_relay.stages.train import lora
from flux2_relay.stages.train.dora import MAGNITUDE
from flux2_relay.stages.train.options import LoraOptions, TrainOptions
from flux2_relay.stages.train.transformer import Transformer

GRADIENTS = 5e-5
STEPS = 20
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.02}
KINDS = {
    "dora": LoraOptions(kind="dora", rank=3, alpha=6.0),
    "lokr": LoraOptions(kind="lokr", rank=3, alpha=6.0, factor=4),
    "lokr near the square root": LoraOptions(kind="lokr", rank=2, alpha=2.0, factor="auto"),
    "lokr whole": LoraOptions(kind="lokr", rank=500, alpha=500.0, factor=4),  # peft scales this too, others do not
}


def config_of(options: LoraOptions, targets: list[str]) -> LoraConfig | LoKrConfig:
    if options.kind == "dora":
        return LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets, use_dora=True)
    factor = -1 if options.factor == "auto" else options.factor
    return LoKrConfig(r=options.rank, alpha=options.alpha, target_modules=targets, decompose_factor=factor)


@contextmanager
def adapted(
    reference: Reference, options: LoraOptions, values: Mapping[str, np.ndarray]
) -> Iterator[tuple[Flux2Transformer2DModel, dict[str, torch.nn.Parameter]]]:
    """The reference's transformer anew with peft's adapter holding `values`, and its factors by our names."""
    model = Flux2Transformer2DModel.from_pretrained(reference.folder / "transformer", torch_dtype=torch.float32)
    targets = reference_training.block_linears(model)
    model.requires_grad_(False)
    inject_adapter_in_model(config_of(options, targets), model)
    factors = {
        name.replace(".default", "").replace(f"{MAGNITUDE}.weight", MAGNITUDE): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert set(factors) == set(values)
    with torch.no_grad():
        for name, parameter in factors.items():
            assert parameter.shape == values[name].shape, name
            parameter.copy_(torch.from_numpy(values[name]))
    yield model, factors


def attach(model: Transformer, options: LoraOptions) -> ours.Arrays:
    """Adapters of which no factor is zero; magnitudes near the lengths that they began as."""
    start = ours.attach(model, options)
    values = cases.adapter({name: value.shape for name, value in start.items()}, seed=1)
    for name, value in start.items():
        if name.endswith(MAGNITUDE):
            values[name] = value * (1 + 0.1 * np.sin(100 * values[name]))
        if name.endswith("lokr_w1"):
            values[name] = 0.3 * values[name]
    lora.load(model, {name: mx.array(value) for name, value in values.items()})
    return values


def case_for(reference: Reference, seed: int = 3) -> cases.Case:
    config, random = reference.transformer.config, np.random.default_rng(seed)
    guidance = (1.0, 2.5) if config.guidance_embeds else None
    sigma = random.uniform(0.02, 0.98, 2)
    return cases.draw(config.joint_attention_dim, seed=seed, text=24, grids=((3, 4),), sigma=sigma, guidance=guidance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts(reference: Reference, kind: str) -> None:
    options, model, case = KINDS[kind], ours.load(reference.folder), case_for(reference)
    values = attach(model, options)
    with adapted(reference, options, values) as (theirs, factors):
        expected_loss, expected = reference_training.gradients(theirs, case, factors)
    loss, actual = ours.gradients(model, case)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_all_near(actual, expected, GRADIENTS)


def test_dora_starts_with_pefts_magnitudes(reference: Reference) -> None:
    model, options = ours.load(reference.folder), KINDS["dora"]
    start = ours.attach(model, options)
    with adapted(reference, options, start) as (theirs, _):
        lengths = {
            f"{name}.{MAGNITUDE}": torch.linalg.norm(theirs.get_submodule(name).base_layer.weight, dim=1).numpy()
            for name in model.adapters
        }
    assert_all_near({name: value for name, value in start.items() if name in lengths}, lengths, 1e-6)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_twenty_steps(reference: Reference, kind: str) -> None:
    options, model = KINDS[kind], ours.load(reference.folder)
    start, steps = ours.attach(model, options), [case_for(reference, seed) for seed in range(STEPS)]
    with adapted(reference, options, start) as (theirs, factors):
        expected_losses, expected = reference_training.train(theirs, steps, factors, ADAMW)
    losses, actual = ours.train(model, steps, TrainOptions(steps=STEPS, clip=1.0, **ADAMW))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert_all_near(actual, expected, 1e-3)
