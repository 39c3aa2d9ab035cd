"""What may be attached to a linear, and plain LoRA, the first of it: y = Wx + (alpha / rank) B(Ax).

A kind is a named tuple of arrays, so that compiled pieces take it as an argument, with all that blocks, their backward
pass and the optimizer ask of it. Two kinds must not have the same tree of arrays: compiled functions tell them apart
by nothing else. The others are in `dora.py` and `lokr.py`; `Sum` is several updates of one linear, for drawing.

Letters: r rank; W [out, in] is always dense and in the type of the inputs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from flux2_relay.stages.train.cuts import cut, flat, joined, product
from flux2_relay.stages.train.dropout import dropped

Named = dict[str, mx.array]
"""Weights of one adapter, or their gradients, by what follows the module's path in their names."""
Kept = mx.array | tuple[mx.array, ...]
"""What `pull` leaves for `gradients`."""


class Adapter(Protocol):
    """One linear's adapter; all its weights are float32, whatever the base is."""

    @property
    def dropping(self) -> tuple[mx.array, ...]:
        """() for no dropout, else `keys` [B, 2] and `keep` [] of `dropout.py`."""
        ...

    def weights(self) -> Named:
        """What is trained."""
        ...

    def with_weights(self, values: Mapping[str, mx.array]) -> "Adapter":
        """The same adapter with other values of `weights`."""
        ...

    def with_dropout(self, dropping: tuple[mx.array, ...]) -> "Adapter":
        """The same adapter with part of its input left out."""
        ...

    def apply(self, x: mx.array, weight: mx.array) -> mx.array:
        """x [..., in] through the linear and its adapter -> [..., out]."""
        ...

    def delta(self, x: mx.array, weight: mx.array, base: mx.array) -> mx.array:
        """What the adapter adds to `base`, the linear's own output of x."""
        ...

    def pull(self, cotangents: Sequence[mx.array], weight: mx.array) -> tuple[mx.array, Kept]:
        """The cotangent of the input, from the pieces of the output's, and what `gradients` takes up again."""
        ...

    def gradients(
        self, inputs: Sequence[mx.array], cotangents: Sequence[mx.array], kept: Kept, weight: mx.array
    ) -> Named:
        """Gradients of `weights`, float32, from the pieces of the input and of the output's cotangent."""
        ...


class Lora(NamedTuple):
    """A [r, in], B [out, r] and scale []; B starts at zero, so step 0 is the base model."""

    a: mx.array
    b: mx.array
    scale: mx.array
    dropping: tuple[mx.array, ...] = ()

    def weights(self) -> Named:
        """A and B."""
        return {"lora_A.weight": self.a, "lora_B.weight": self.b}

    def with_weights(self, values: Mapping[str, mx.array]) -> "Lora":
        """Other A and B at the same scale."""
        return self._replace(a=values["lora_A.weight"], b=values["lora_B.weight"])

    def with_dropout(self, dropping: tuple[mx.array, ...]) -> "Lora":
        """The same, dropping part of what A takes."""
        return self._replace(dropping=dropping)

    def apply(self, x: mx.array, weight: mx.array) -> mx.array:
        """The base product plus scale * B(Ax)."""
        low, rows = (
            flat(self.down(dropped([x], self.dropping))),
            flat(x),
        )  # one matrix each, so that B = 0 gives the bits of the base alone
        total = mx.addmm(low @ self.b.astype(x.dtype).T, rows, weight.T)
        return total.reshape(*x.shape[:-1], -1)

    def delta(self, x: mx.array, weight: mx.array, base: mx.array) -> mx.array:
        """scale * B(Ax)."""
        return self.down(dropped([x], self.dropping)) @ self.b.astype(x.dtype).T

    def pull(self, cotangents: Sequence[mx.array], weight: mx.array) -> tuple[mx.array, mx.array]:
        """The cotangents of the input and of Ax."""
        low = self.low_cotangent(cotangents)
        total = dropped([low @ self.a.astype(low.dtype)], self.dropping)[0]
        return product(cotangents, cut(weight, cotangents, axis=0), total), low

    def gradients(
        self, inputs: Sequence[mx.array], cotangents: Sequence[mx.array], kept: Kept, weight: mx.array
    ) -> Named:
        """Of A and B; `kept` is the cotangent of Ax."""
        assert isinstance(kept, mx.array)
        return self.gradients_and_down(inputs, cotangents, kept)[0]

    def gradients_and_down(
        self, inputs: Sequence[mx.array], cotangents: Sequence[mx.array], low: mx.array
    ) -> tuple[Named, mx.array]:
        """The gradients of A and B, and scale * Ax [rows, r], which they needed."""
        rows = [flat(x) for x in dropped(inputs, self.dropping)]
        of_a = [flat(low).T @ x for x in rows]
        down = self.down(rows)
        of_b = [flat(g).T @ down for g in cotangents]
        found = joined(of_a, axis=1).astype(mx.float32), joined(of_b, axis=0).astype(mx.float32)
        return dict(zip(("lora_A.weight", "lora_B.weight"), found, strict=True)), down

    def down(self, inputs: Sequence[mx.array]) -> mx.array:
        """scale * Ax [..., r] of an input in pieces, of which nothing is dropped any more."""
        dtype = inputs[0].dtype
        parts = [columns.T for columns in cut(self.a.astype(dtype), inputs, axis=1)]
        return product(inputs, parts) * self.scale.astype(dtype)

    def low_cotangent(self, cotangents: Sequence[mx.array]) -> mx.array:
        """The cotangent [..., r] of Ax, from the pieces of the output's."""
        dtype = cotangents[0].dtype
        return product(cotangents, cut(self.b.astype(dtype), cotangents, axis=0)) * self.scale.astype(dtype)


class Sum(NamedTuple):
    """Several adapters of one linear, each at a strength []: for drawing, not for training."""

    parts: tuple[Adapter, ...]
    strengths: tuple[mx.array, ...]
    dropping: tuple[mx.array, ...] = ()

    def apply(self, x: mx.array, weight: mx.array) -> mx.array:
        """The base product plus what each adds to it."""
        total = base = x @ weight.T
        for part, strength in zip(self.parts, self.strengths, strict=True):
            total = total + strength.astype(x.dtype) * part.delta(x, weight, base)
        return total
