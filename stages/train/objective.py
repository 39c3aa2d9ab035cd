"""The training objective: rectified flow from data (sigma 0) to noise (sigma 1).

x = (1 - sigma) latents + sigma noise; target velocity = noise - latents; loss = mean over rows and channels of
w(sigma) (prediction - target)^2 in float32, averaged over the batch. The model is told sigma itself, in [0, 1].
A mask weights the rows by mask / mean(mask): a small subject counts as much as a large one. An item's own weight
(`train.prior_weight`) multiplies its loss. References are read by the model and take no part in the loss.

Letters: B batch, L image tokens, R reference tokens, C channels.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train import randomness
from flux2_relay.stages.train.options import TrainOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Items of one bucket: latents [B, L, 128] and context [B, T, C] with the position ids [L, 4] and [T, 4]."""

    latents: mx.array
    context: mx.array
    latent_ids: mx.array
    text_ids: mx.array
    references: mx.array | None = None
    """Tokens of all reference images, one behind the other: [B, R, 128]."""
    reference_ids: mx.array | None = None
    """[R, 4]: the time of reference k is 10 + 10k."""
    mask: mx.array | None = None
    """[B, L] in [0, 1]: how much each row counts; no item is all zero."""
    item_weight: mx.array | None = None
    """[B]: what an item's loss is multiplied by."""

    def with_references(self, target: mx.array) -> tuple[mx.array, mx.array]:
        """Tokens [B, L, 128] of the target and their ids, those of the references behind them."""
        if self.references is None or self.reference_ids is None:
            return target, self.latent_ids
        tokens = mx.concatenate([target, self.references.astype(target.dtype)], axis=1)
        return tokens, mx.concatenate([self.latent_ids, self.reference_ids])


def draw(seed: int, step: int, item: int, shape: tuple[int, ...], options: TrainOptions) -> tuple[float, mx.array]:
    """Sigma in (0, 1) and noise of `shape` [L, C] float32 for one item of one step.

    `item` counts through the whole batch of the step, over accumulation and ranks.
    """
    rows = math.prod(shape[:-1])
    sigma = sigma_at(randomness.uniform(seed, "sigma", step, item), rows, options)
    return sigma, mx.random.normal(shape, key=randomness.key(seed, "noise", step, item))


def sigma_at(u: float, rows: int, options: TrainOptions) -> float:
    """The `u` quantile (0 < u < 1) of the distribution `train.sigma` for an image of `rows` tokens.

    Sources: `flux2_shift` musubi-tuner (logit-normal, then BFL's shift, mu linear in the tokens); `content` and
    `style` ai-toolkit; `logit_normal` and `shift` Esser et al. 2024.
    """
    match options.sigma:
        case "uniform":
            return u
        case "logit_normal":
            return _sigmoid(NormalDist().inv_cdf(u))
        case "flux2_shift":
            return shift(_sigmoid(NormalDist().inv_cdf(u)), math.exp(flux2_mu(rows)))
        case "shift":
            return shift(_sigmoid(NormalDist().inv_cdf(u)), options.sigma_shift)
        case "content":
            return 1 - u**3
        case "style":
            return u**3
    raise ValueError(options.sigma)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def shift(sigma: float, by: float) -> float:
    """Sigma moved towards noise: s sigma / (1 + (s - 1) sigma)."""
    return by * sigma / (1 + (by - 1) * sigma)


def flux2_mu(rows: int) -> float:
    """Log of FLUX.2's training shift: linear in tokens, 256 -> 0.5, 4096 -> 1.15."""
    return 0.5 + (1.15 - 0.5) * (rows - 256) / (4096 - 256)


_WEIGHTED = ((0.0, 0.45), (0.2, 0.72), (0.55, 1.0), (0.87, 1.52), (1.0, 0.91))
"""Supporting points (sigma, weight) of ai-toolkit's table for `weighted`."""
_WEIGHTED_MEAN = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(_WEIGHTED))


def loss_weight(sigma: np.ndarray, options: TrainOptions) -> np.ndarray:
    """w(sigma) [B] float32 of `train.weighting`; each has mean 1 over uniform sigma."""
    match options.weighting:
        case "bell":  # ai-toolkit: a Gaussian around 1/2, lowered to 0 at both ends
            return ((np.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)) / 0.24909).astype(np.float32)
        case "weighted":
            points, weights = zip(*_WEIGHTED, strict=True)
            return (np.interp(sigma, points, weights) / _WEIGHTED_MEAN).astype(np.float32)
    return np.ones_like(sigma, dtype=np.float32)


def add_noise(latents: mx.array, noise: mx.array, sigma: mx.array) -> mx.array:
    """The point at `sigma` [B] on the straight line from latents to noise, [B, L, C] float32."""
    at = sigma[:, None, None].astype(mx.float32)
    return (1 - at) * latents.astype(mx.float32) + at * noise.astype(mx.float32)


def loss(
    prediction: mx.array, latents: mx.array, noise: mx.array, weight: mx.array, mask: mx.array | None = None
) -> mx.array:
    """Weighted mean squared error of a velocity [B, L, C], in float32; `weight` [B] of items, `mask` [B, L] of rows."""
    target = noise.astype(mx.float32) - latents.astype(mx.float32)
    of_rows = mx.mean((prediction.astype(mx.float32) - target) ** 2, axis=2)
    if mask is not None:
        mask = mask.astype(mx.float32)
        of_rows = of_rows * (mask / mx.mean(mask, axis=1, keepdims=True))
    return mx.mean(weight * mx.mean(of_rows, axis=1))
