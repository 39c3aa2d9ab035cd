"""DoRA: a LoRA whose rows are brought to a trained length, y_i = m_i (W + s B A)_i x / |(W + s B A)_i|.

The lengths |W + s B A| are constants to the gradient (Liu et al. 2024, section 4.3; peft does the same). They are not
taken from the sum, which is never formed: |w + d|^2 = |w|^2 + 2 w d + |d|^2, where the first is measured once, and the
others come from W A^T and A A^T. m starts as |W|, so step 0 is the base model to the bit.

Dropout acts on what A takes, as in LoRA; peft drops the input of the base product's share as well.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from flux2_relay.stages.train.cuts import cut, flat, joined, product
from flux2_relay.stages.train.kinds import Kept, Lora, Named

MAGNITUDE = "lora_magnitude_vector"
"""peft's name of m."""
_LEAST = 1e-24  # a row of nothing but zeros has no direction


class Dora(NamedTuple):
    """A [r, in], B [out, r], scale [], m [out], and the squared lengths |W|^2 [out] of the base's rows; all float32."""

    a: mx.array
    b: mx.array
    scale: mx.array
    magnitude: mx.array
    squares: mx.array
    dropping: tuple[mx.array, ...] = ()

    @property
    def low(self) -> Lora:
        """The LoRA inside."""
        return Lora(self.a, self.b, self.scale, self.dropping)

    def weights(self) -> Named:
        """A, B and m."""
        return {**self.low.weights(), MAGNITUDE: self.magnitude}

    def with_weights(self, values: Mapping[str, mx.array]) -> "Dora":
        """Other A, B and m over the same base."""
        return self._replace(a=values["lora_A.weight"], b=values["lora_B.weight"], magnitude=values[MAGNITUDE])

    def with_dropout(self, dropping: tuple[mx.array, ...]) -> "Dora":
        """The same, dropping part of what A takes."""
        return self._replace(dropping=dropping)

    def lengths(self, weight: mx.array) -> mx.array:
        """|W + s B A| of each row [out] float32, a constant to the gradient."""
        crossed = (weight @ self.a.astype(weight.dtype).T).astype(mx.float32)
        scaled = self.scale * self.b
        added = scaled * (2 * crossed + scaled @ (self.a @ self.a.T))
        return mx.stop_gradient(mx.sqrt(mx.maximum(self.squares + added.sum(axis=-1), _LEAST)))

    def apply(self, x: mx.array, weight: mx.array) -> mx.array:
        """What LoRA gives, each output times m over the length of its row."""
        return _times(self.low.apply(x, weight), self.magnitude / self.lengths(weight))

    def delta(self, x: mx.array, weight: mx.array, base: mx.array) -> mx.array:
        """The same less the base product."""
        factor = self.magnitude / self.lengths(weight)
        return _times(base, factor - 1) + _times(self.low.delta(x, weight, base), factor)

    def pull(self, cotangents: Sequence[mx.array], weight: mx.array) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """The cotangents of the input and of Ax; with that the lengths."""
        lengths = self.lengths(weight)
        total, low = self.low.pull(self._scaled(cotangents, lengths), weight)
        return total, (low, lengths)

    def gradients(
        self, inputs: Sequence[mx.array], cotangents: Sequence[mx.array], kept: Kept, weight: mx.array
    ) -> Named:
        """Of A, B and m; the outputs before they were scaled are computed once more, piece by piece."""
        low, lengths = kept
        found, down = self.low.gradients_and_down(inputs, self._scaled(cotangents, lengths), low)
        dtype, of_rows, inputs = down.dtype, [], [flat(x) for x in inputs]
        pairs = cut(weight, cotangents, axis=0), cut(self.b.astype(dtype), cotangents, axis=0)
        for g, rows, b in zip(cotangents, *pairs, strict=True):
            columns = [part.T for part in cut(rows, inputs, axis=1)]
            unscaled = product(inputs, columns, down @ b.T)
            of_rows.append((flat(g).astype(mx.float32) * unscaled.astype(mx.float32)).sum(axis=0))
        return {**found, MAGNITUDE: joined(of_rows, axis=0) / lengths}

    def _scaled(self, cotangents: Sequence[mx.array], lengths: mx.array) -> list[mx.array]:
        pieces = cut(self.magnitude / lengths, cotangents, axis=0)
        return [_times(g, piece) for g, piece in zip(cotangents, pieces, strict=True)]


def _times(x: mx.array, factor: mx.array) -> mx.array:
    """x times a float32 factor, in float32: near 1 there are 256 numbers of bfloat16 to a factor of 2."""
    return (x.astype(mx.float32) * factor).astype(x.dtype)
