"""A running mean of the adapter, saved beside it: `train.ema` is its decay.

The decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the mean forgets the untrained start early in
a run; a function of n alone, so a resumed run has the mean of the unbroken one bit for bit.
"""

from collections.abc import Mapping

import mlx.core as mx

Parameters = dict[str, mx.array]


def follow(mean: Mapping[str, mx.array], parameters: Mapping[str, mx.array], decay: float, step: int) -> Parameters:
    """The mean after update number `step` (from 0) led to `parameters`; evaluated, float32."""
    share = min(decay, (1 + step) / (10 + step))
    moved = {name: share * mean[name] + (1 - share) * value for name, value in parameters.items()}
    mx.eval(moved)
    return moved
