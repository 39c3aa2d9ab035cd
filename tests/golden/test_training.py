"""Velocity, gradients and updates against the recorded results of diffusers, peft and torch."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny import ours
from tiny.cases import Case, steps
from tiny.compare import GRADIENT, LOSSES, TRAINED, VELOCITY, assert_all_near, assert_near
from tiny.golden import Golden

from flux2_relay.stages.train import lora
from flux2_relay.stages.train.options import LoraOptions, TrainOptions
from flux2_relay.stages.train.transformer import Transformer


def options(golden: Golden) -> LoraOptions:
    return LoraOptions(rank=int(golden.metadata["rank"]), alpha=float(golden.metadata["alpha"]), targets="blocks")


def adapted(golden: Golden) -> Transformer:
    """The transformer with the recorded adapter, no factor of which is zero."""
    model = ours.load(golden.folder)
    ours.attach(model, options(golden), golden.under("training/adapter/"))
    return model


def test_velocity(golden: Golden) -> None:
    model = ours.load(golden.folder)
    for name in golden.children("velocity/"):
        expected = golden.arrays[f"velocity/{name}/expected"]
        assert_near(ours.velocity(model, golden.case(f"velocity/{name}/")), expected, VELOCITY, name)


def test_loss_and_gradients_of_every_block_linear(golden: Golden) -> None:
    loss, actual = ours.gradients(adapted(golden), golden.case("training/"))
    assert loss == pytest.approx(float(golden.arrays["training/loss"][0]), rel=5e-6)
    assert_all_near(actual, golden.under("training/gradient/"), GRADIENT)


def test_updates_from_a_fresh_adapter(golden: Golden) -> None:
    """B starts at zero here, so A moves from the second update on."""
    model, recorded = ours.load(golden.folder), golden.under("training/")
    factors = golden.under("training/adapter/")
    ours.attach(model, options(golden), {name: value * (".lora_A." in name) for name, value in factors.items()})
    cases = steps(golden.case("training/"), recorded["sigmas"], recorded["noises"])
    adamw = json.loads(golden.metadata["adamw"])
    train = TrainOptions(steps=len(cases), clip=1.0, **adamw | {"betas": tuple(adamw["betas"])})
    losses, actual = ours.train(model, cases, train)
    np.testing.assert_allclose(losses, recorded["losses"], rtol=LOSSES)
    assert_all_near(actual, golden.under("training/trained/"), TRAINED)


def test_block_by_block_equals_the_gradient_of_the_whole(golden: Golden) -> None:
    """No torch on either side: MLX's own gradient of the model as one function."""
    model, case = adapted(golden), golden.case("training/")
    expected_loss, expected = whole(model, case)
    loss, actual = ours.gradients(model, case)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_all_near(actual, expected, 1e-5)


def whole(model: Transformer, case: Case) -> tuple[float, ours.Arrays]:
    """Loss and gradients by one `mx.value_and_grad` over the transformer's call."""
    fields = ("latents", "noise", "sigma", "context", "guidance", "latent_ids", "text_ids")
    latents, noise, sigma, context, guidance, latent_ids, text_ids = ours.tensors(case, *fields)
    at = sigma[:, None, None]

    def loss(factors: dict[str, mx.array]) -> mx.array:
        lora.load(model, factors)
        velocity = model((1 - at) * latents + at * noise, context, sigma, guidance, latent_ids, text_ids)
        return mx.mean((velocity - (noise - latents)) ** 2)

    factors = lora.parameters(model)
    value, found = mx.value_and_grad(loss)(factors)
    mx.eval(value, found)
    lora.load(model, factors)
    return float(value), ours.numpy(found)
