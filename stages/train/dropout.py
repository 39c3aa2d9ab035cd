"""Dropout on the input of adapters, from keys: forward and backward make the same mask, and nothing of it is kept.

y = Wx + scale * B(A(dropout(x))), as peft has it: an element of x is zero with probability `lora.dropout` for this
adapter alone (the base product sees x whole), and what stays is divided by the share that stays. A mask is a function
of (seed, step, item, module): a resumed run drops what the unbroken one dropped, two passes what one large batch did.

Letters: B batch, in input width of a linear.
"""

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from flux2_relay.stages.train import randomness


def keys(seed: int, step: int, places: Sequence[int], module: str) -> mx.array:
    """The keys [B, 2] of one adapter's masks in one pass; `places` are those of the items in the step's batch."""
    return mx.stack([randomness.key(seed, "adapter dropout", step, place, module) for place in places])


def dropped(inputs: Sequence[mx.array], dropping: Sequence[mx.array]) -> list[mx.array]:
    """`inputs` [B, rows, ...], pieces side by side of what a linear takes [B, rows, in], under the mask of their keys.

    `dropping` is () for no dropout, or keys [B, 2] and the share that is kept []. The mask depends on the whole width,
    not on how it is cut. All of this is linear in the inputs: cotangents go through the same call.
    """
    if not dropping:
        return list(inputs)
    of_items, keep = dropping
    widths = [piece.shape[-1] for piece in inputs]
    shape = (*inputs[0].shape[1:-1], sum(widths))
    kept = mx.stack([mx.random.bernoulli(keep, shape, key=key) for key in of_items])
    pieces = mx.split(kept, list(accumulate(widths))[:-1], axis=-1) if len(widths) > 1 else [kept]
    zero = mx.array(0, inputs[0].dtype)
    return [mx.where(m, x / keep.astype(x.dtype), zero) for x, m in zip(inputs, pieces, strict=True)]
