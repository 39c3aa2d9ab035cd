"""LoKr: a Kronecker product as the update, y = Wx + s (W1 x W2) x, where W2 may itself be of low rank.

In index form, with out = p k and in = q n: y[p k] = s sum W1[p, q] W2[k, n] x[q n]. W1 mixes blocks of the vector, W2
what is inside each; the product itself is never formed. Sizes are LyCORIS's: p and q are the factor where it divides,
else the largest divisor up to it and to the square root.

Letters: r rank. Source: LyCORIS `LokrModule`, peft `LoKrConfig`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import mlx.core as mx

from flux2_relay.stages.train.cuts import cut, flat, joined, product
from flux2_relay.stages.train.dropout import dropped
from flux2_relay.stages.train.kinds import Kept, Named

Shape = tuple[tuple[int, int], tuple[int, int], bool]
"""W1 [p, q], W2 [k, n], and whether W2 is a product of rank r."""


Factor = Literal["auto"] | int
"""The side that W1 shall have; `auto` is near the square root of the linear's."""


def sides(size: int, factor: Factor) -> tuple[int, int]:
    """`size` as a product of two: the side of W1, and that of W2."""
    if factor != "auto" and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == "auto" else min(factor, math.isqrt(size))
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first


def shape_of(rows: int, columns: int, rank: int, factor: Factor) -> Shape:
    """The sizes of a module's factors; a rank of half of W2's longer side or more would save nothing: W2 whole."""
    (p, k), (q, n) = sides(rows, factor), sides(columns, factor)
    return (p, q), (k, n), 2 * rank < max(k, n)


class Lokr(NamedTuple):
    """W1 [p, q], W2 [k, n] or its factors [k, r] and [r, n], scale []; float32."""

    w1: mx.array
    w2: tuple[mx.array, ...]
    scale: mx.array
    dropping: tuple[mx.array, ...] = ()

    def weights(self) -> Named:
        """W1, and W2 or its two factors."""
        return {"lokr_w1": self.w1, **dict(zip(self._names(), self.w2, strict=True))}

    def with_weights(self, values: Mapping[str, mx.array]) -> "Lokr":
        """Other factors at the same scale."""
        return self._replace(w1=values["lokr_w1"], w2=tuple(values[name] for name in self._names()))

    def with_dropout(self, dropping: tuple[mx.array, ...]) -> "Lokr":
        """The same, dropping part of the input."""
        return self._replace(dropping=dropping)

    def apply(self, x: mx.array, weight: mx.array) -> mx.array:
        """The base product plus the update's."""
        base = flat(x) @ weight.T
        return (base + flat(self.delta(x, weight, base))).reshape(*x.shape[:-1], -1)

    def delta(self, x: mx.array, weight: mx.array, base: mx.array) -> mx.array:
        """s (W1 x W2) x."""
        mixed = self._w1(x.dtype) @ self._inner(dropped([x], self.dropping))
        return mixed.reshape(*x.shape[:-1], -1)

    def pull(self, cotangents: Sequence[mx.array], weight: mx.array) -> tuple[mx.array, mx.array]:
        """The cotangents of the input and of W2 x."""
        blocks = self._blocks(cotangents)
        low = self._w1(blocks.dtype).T @ blocks
        of_input = (low @ self._w2().astype(low.dtype)).reshape(*cotangents[0].shape[:-1], -1)
        return product(cotangents, cut(weight, cotangents, axis=0), dropped([of_input], self.dropping)[0]), low

    def gradients(
        self, inputs: Sequence[mx.array], cotangents: Sequence[mx.array], kept: Kept, weight: mx.array
    ) -> Named:
        """Of W1 and of W2 or its factors; `kept` is the cotangent of W2 x [..., q, k]."""
        assert isinstance(kept, mx.array)
        inputs = dropped(inputs, self.dropping)
        of_rows = self._blocks(cotangents) @ self._inner(inputs).swapaxes(-1, -2)
        of_w1 = self.scale * of_rows.reshape(-1, *of_rows.shape[-2:]).astype(mx.float32).sum(axis=0)
        of_w2 = (flat(kept).T @ flat(self._inputs(inputs))).astype(mx.float32)
        found = (of_w2,) if len(self.w2) == 1 else (of_w2 @ self.w2[1].T, self.w2[0].T @ of_w2)
        return {"lokr_w1": of_w1, **dict(zip(self._names(), found, strict=True))}

    def _names(self) -> tuple[str, ...]:
        return ("lokr_w2",) if len(self.w2) == 1 else ("lokr_w2_a", "lokr_w2_b")

    def _w1(self, dtype: mx.Dtype) -> mx.array:
        return (self.scale * self.w1).astype(dtype)

    def _w2(self) -> mx.array:
        return self.w2[0] if len(self.w2) == 1 else self.w2[0] @ self.w2[1]

    def _inputs(self, inputs: Sequence[mx.array]) -> mx.array:
        """The input in its blocks, [..., q, n]."""
        whole = joined(inputs, axis=-1)
        return whole.reshape(*whole.shape[:-1], self.w1.shape[1], -1)

    def _inner(self, inputs: Sequence[mx.array]) -> mx.array:
        """W2 x of each block, [..., q, k]."""
        return self._inputs(inputs) @ self._w2().astype(inputs[0].dtype).T

    def _blocks(self, cotangents: Sequence[mx.array]) -> mx.array:
        """The output's cotangent in its blocks, [..., p, k]."""
        whole = joined(cotangents, axis=-1)
        return whole.reshape(*whole.shape[:-1], self.w1.shape[0], -1)
