"""The base under several trainings at once: a block is read and made dense once for all that go through it together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import mlx.core as mx

from flux2_relay.stages.quantize import Weight, dense
from flux2_relay.stages.train.residence import BlockWeights, Residence
from flux2_relay.stages.train.transformer import Transformer, block_shapes

Shapes = Callable[[int], Mapping[str, tuple[int, ...]]]
"""The tensors of the block at a place, by their names inside it."""


class SharedBase:
    """Hands each block's weights to all passes that ask for it in turn; matrices dense, in the compute dtype."""

    def __init__(self, inner: Residence, shapes: Shapes, dtype: mx.Dtype) -> None:
        """In front of the residence `inner` of the weights as they are kept."""
        self._inner, self._shapes, self._dtype = inner, shapes, dtype
        self._last: tuple[int, BlockWeights] | None = None
        self._announced: Sequence[int] = ()

    def announce(self, order: Sequence[int]) -> None:
        """The order of one pass; of passes that begin together the longest holds, which goes back the furthest."""
        if len(order) > len(self._announced):
            self._announced = order
            self._inner.announce(order)

    def weights(self, place: int) -> BlockWeights:
        """The weights of one block; those handed out before may be let go of."""
        self._announced = ()
        if self._last is None or self._last[0] != place:
            self._last = None
            self._last = (place, self._dense(place, self._inner.weights(place)))
        return self._last[1]

    def close(self) -> None:
        """Let go of all."""
        self._last = None
        self._inner.close()

    def _dense(self, place: int, weights: BlockWeights) -> dict[str, Weight]:
        """Computed by whoever is the first to need a matrix."""
        shapes = self._shapes(place)
        matrices = {name for name, shape in shapes.items() if len(shape) == 2}
        return {
            name: dense(weight, shapes[name][1], self._dtype) if name in matrices else weight
            for name, weight in weights.items()
        }


def shared(transformer: Transformer) -> Transformer:
    """The transformer with its base ready for several; each training takes a copy of it, with adapters of its own."""
    spec = transformer.spec
    base = SharedBase(transformer.residence, lambda place: block_shapes(spec, place), transformer.dtype)
    return replace(transformer, residence=base)
