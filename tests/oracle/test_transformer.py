"""Velocity and adapter gradients of one call, against diffusers, peft and torch's autograd."""

import pytest
from oracle import reference_training
from oracle.reference import Reference
from tiny import cases, ours
from tiny.cases import Case
from tiny.compare import GRADIENT, VELOCITY, assert_all_near, assert_near

from flux2_relay.stages.train.options import LoraOptions

CASES = {
    "plain": {},
    "one": {"sigma": (0.5,), "grids": ((1, 1),), "text": 1},
    "ends": {"sigma": (0.0, 1.0, 0.999)},
    "full_text": {"text": 512, "grids": ((5, 3),)},
    "references": {"grids": ((4, 6), (3, 5), (6, 2))},
}


def case(reference: Reference, name: str, guided: bool) -> Case:
    arguments = {"seed": 7, "sigma": (0.83, 0.07), **CASES[name]}
    guidance = [1.0, 3.5, 4.0][: len(arguments["sigma"])] if guided else None
    width = reference.transformer.config.joint_attention_dim
    return cases.draw(width, guidance=guidance, **arguments)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_velocity(reference: Reference, name: str, guided: bool) -> None:
    given = case(reference, name, guided and reference.transformer.config.guidance_embeds)
    expected = reference_training.velocity(reference.transformer, given)
    assert_near(ours.velocity(ours.load(reference.folder), given), expected, VELOCITY, name)


@pytest.mark.parametrize("name", ["plain", "one", "full_text", "edit"])
def test_gradients_of_every_block_linear(reference: Reference, name: str) -> None:
    """alpha differs from rank and no B is zero, so a lost scale or a swapped factor shows."""
    model = ours.load(reference.folder)
    fresh = ours.attach(model, LoraOptions(rank=4, alpha=6.0, targets="blocks"))
    values = cases.adapter({name: value.shape for name, value in fresh.items()}, seed=11)
    ours.attach(model, LoraOptions(rank=4, alpha=6.0, targets="blocks"), values)
    given = case(reference, name.replace("edit", "plain"), reference.transformer.config.guidance_embeds)
    if name == "edit":
        given = cases.for_edits(given, seed=12)
    linears = reference_training.block_linears(reference.transformer)
    with reference_training.adapted(reference.transformer, linears, values, alpha=6.0) as factors:
        expected_loss, expected = reference_training.gradients(reference.transformer, given, factors)
    loss, actual = ours.gradients(model, given)
    assert loss == pytest.approx(expected_loss, rel=5e-6)
    assert_all_near(actual, expected, GRADIENT)


def test_targets_attention_are_the_attention_of_both_kinds_of_block(reference: Reference) -> None:
    fresh = ours.attach(ours.load(reference.folder), LoraOptions(rank=2, alpha=2.0, targets="attention"))
    linears = [name for name in reference_training.block_linears(reference.transformer) if ".attn." in name]
    assert set(fresh) == {f"{name}.lora_{factor}.weight" for name in linears for factor in "AB"}
