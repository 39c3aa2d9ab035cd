"""From noise to latents: FLUX.2's schedule, Euler steps, guidance either way.

Letters: L image tokens, T text rows, C context channels.
Source: diffusers `Flux2Pipeline`, `Flux2KleinPipeline` and `compute_empirical_mu`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import mlx.core as mx

from flux2_relay.stages.train import randomness
from flux2_relay.stages.train.contexts import reference_ids
from flux2_relay.stages.train.transformer import Transformer, image_ids, text_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture to draw: contexts [T, C], size in tokens, latents [h, w, 128] of references, and how."""

    context: mx.array
    negative: mx.array | None  # for classifier-free guidance; None where the model needs none
    height: int
    width: int
    seed: int
    steps: int
    guidance: float
    references: tuple[mx.array, ...] = ()


def schedule(steps: int, rows: int) -> list[float]:
    """Sigmas from 1 down to 0, `steps` + 1 of them, for an image of `rows` tokens."""
    shift = math.exp(empirical_mu(steps, rows))
    grid = [1 - n / steps for n in range(steps)]
    return [shift / (shift + (1 / sigma - 1)) for sigma in grid] + [0.0]


def empirical_mu(steps: int, rows: int) -> float:
    """Log of the schedule's shift; linear in the tokens at 10 and at 200 steps, and between them in the steps."""
    at_10, at_200 = 8.73809524e-5 * rows + 1.89833333, 1.6927e-4 * rows + 0.45666666
    if rows > 4300:
        return at_200
    return at_200 + (steps - 200) * (at_200 - at_10) / 190


def draw(transformer: Transformer, picture: Picture, progress: Callable[[], object] = lambda: None) -> mx.array:
    """The latents [height, width, 128] float32 of a picture; the same seed always starts from the same noise.

    `progress` is called after each step.
    """
    running = replace(transformer, run=transformer.pieces)
    rows = picture.height * picture.width
    latents = mx.random.normal((1, rows, transformer.spec.channels), key=randomness.key(picture.seed, "preview"))
    sigmas = schedule(picture.steps, rows)
    for sigma, following in pairwise(sigmas):
        velocity = guided_velocity(running, picture, latents, sigma)
        latents = latents + (following - sigma) * velocity.astype(mx.float32)
        mx.eval(latents)  # a step at a time: nothing is dispatched further ahead than it can run
        progress()
    transformer.pieces.settle()
    return latents.reshape(picture.height, picture.width, -1)


def guided_velocity(transformer: Transformer, picture: Picture, latents: mx.array, sigma: float) -> mx.array:
    """Velocity [1, L, 128]: guidance as an input where the model takes one, else negative + w (positive - negative)."""
    positive = _velocity(transformer, picture, picture.context, latents, sigma)
    if transformer.spec.guidance or picture.negative is None or picture.guidance <= 1:
        return positive
    negative = _velocity(transformer, picture, picture.negative, latents, sigma)
    return negative + picture.guidance * (positive - negative)


def _velocity(
    transformer: Transformer, picture: Picture, context: mx.array, latents: mx.array, sigma: float
) -> mx.array:
    guidance = mx.array([picture.guidance], mx.float32) if transformer.spec.guidance else None
    tokens, ids, rows = latents, image_ids(picture.height, picture.width), latents.shape[1]
    if picture.references:
        joined = [reference.reshape(1, -1, latents.shape[-1]) for reference in picture.references]
        tokens = mx.concatenate([latents, *joined], axis=1)
        ids = mx.concatenate([ids, reference_ids([(r.shape[0], r.shape[1]) for r in picture.references])])
    at = mx.array([sigma], mx.float32)
    return transformer(tokens, context[None], at, guidance, ids, text_ids(context.shape[0]))[:, :rows]
