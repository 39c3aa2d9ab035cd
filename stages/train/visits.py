"""The base's matrices one after another, each block read once, for whatever an adapter must know of them."""

from collections.abc import Collection, Iterator

import mlx.core as mx

from flux2_relay.stages.quantize import Weight, dense
from flux2_relay.stages.train.transformer import Transformer, block_path

_STRETCH_BYTES = 1 << 24
"""Bytes of float32 at a time."""


def linears(transformer: Transformer, paths: Collection[str]) -> Iterator[tuple[str, Weight]]:
    """The weight of each path, those outside the blocks first and then block by block."""
    for path in paths:
        if path in transformer.outer:
            yield path, transformer.outer[path]
    starts = {place: block_path(transformer.spec, place) + "." for place in range(transformer.spec.blocks)}
    inside = {place: [path for path in paths if path.startswith(start)] for place, start in starts.items()}
    places = [place for place, found in inside.items() if found]
    transformer.residence.announce(places)
    for place in places:
        weights = transformer.residence.weights(place)
        yield from ((path, weights[path.removeprefix(starts[place])]) for path in inside[place])


def stretches(weight: Weight, columns: int) -> Iterator[mx.array]:
    """The rows of a matrix as it is used, [n, columns] float32, a stretch at a time."""
    whole = dense(weight, columns, mx.float32) if isinstance(weight, tuple) else weight
    step = max(1, _STRETCH_BYTES // (4 * columns))
    for first in range(0, whole.shape[0], step):
        yield whole[first : first + step].astype(mx.float32)
