"""The context that the transformer reads, rebuilt from the rows that are stored.

Both stages share this: stage one says which rows it stores, stage two puts them together again.
"""

import mlx.core as mx


def assemble(own: mx.array, prefix: mx.array, pad: mx.array, length: int) -> mx.array:
    """Left-padded context [length, C]: the pad row as often as needed, the shared prefix, a caption's own rows.

    own [n, C], prefix [P, C], pad [1, C], all of one dtype. `length` counts pads: they move the caption's position ids.
    """
    pads = length - prefix.shape[0] - own.shape[0]
    return mx.concatenate([mx.broadcast_to(pad, (pads, pad.shape[1])), prefix, own])
