"""Fifty steps of training from the same start on the same draws, against diffusers + peft + torch."""

from typing import Any

import numpy as np
from oracle import reference_training
from oracle.reference import Reference
from tiny import cases, ours
from tiny.compare import LOSSES, TRAINED, assert_all_near

from flux2_relay.stages.train.options import LoraOptions, TrainOptions

STEPS = 50
# Where a gradient passes near zero, AdamW divides rounding by itself: with eps 1e-8 a single element in thousands is
# then off by more than the limit, in torch's own float32 against its float64 as well. 1e-6 keeps that quiet.
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.02}


def test_fifty_steps(reference: Reference) -> None:
    options = LoraOptions(rank=4, alpha=8.0, targets="blocks")
    model = ours.load(reference.folder)
    start = ours.attach(model, options)
    steps = _cases(reference)
    linears = reference_training.block_linears(reference.transformer)
    with reference_training.adapted(reference.transformer, linears, start, alpha=8.0) as factors:
        expected_losses, expected = reference_training.train(reference.transformer, steps, factors, ADAMW)
    losses, actual = ours.train(model, steps, TrainOptions(steps=STEPS, clip=1.0, **ADAMW))
    np.testing.assert_allclose(losses, expected_losses, rtol=LOSSES)
    assert_all_near(actual, expected, TRAINED)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]), "nothing was learnt"


def _cases(reference: Reference) -> list[cases.Case]:
    """Two new items a step."""
    config, random = reference.transformer.config, np.random.default_rng(5)
    guidance = (1.0, 2.5) if config.guidance_embeds else None
    return [
        cases.draw(
            config.joint_attention_dim,
            seed=step,
            text=24,
            grids=((3, 4),),
            sigma=random.uniform(0.02, 0.98, 2),
            guidance=guidance,
        )
        for step in range(STEPS)
    ]
