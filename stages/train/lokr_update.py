"""A LoKr of a file, scale * (W1 x W2), where each factor may have been a product of two itself."""

import math
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train import lokr
from flux2_relay.stages.train.kinds import Adapter
from flux2_relay.stages.train.lokr import Lokr
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.updates import Update, over, same


@dataclass(frozen=True, slots=True)
class LokrUpdate:
    """W1 [p, q]; W2 [k, n], or its factors [k, r] and [r, n]; float32."""

    kind: ClassVar[str] = "lokr"
    w1: mx.array
    w2: tuple[mx.array, ...]
    scale: float

    @property
    def rank(self) -> int | None:
        """Of W2; None where it stands there whole."""
        return self.w2[0].shape[1] if len(self.w2) == 2 else None

    @property
    def strength(self) -> float:
        """alpha / rank, or 1."""
        return self.scale

    @property
    def inner(self) -> mx.array:
        """W2 [k, n]."""
        return self.w2[0] if len(self.w2) == 1 else self.w2[0] @ self.w2[1]

    def arrays(self) -> tuple[mx.array, ...]:
        """All factors."""
        return self.w1, *self.w2

    def is_zero(self) -> bool:
        """Whether any factor is."""
        return any(not np.any(np.asarray(x)) for x in self.arrays())

    def change(self, rows: mx.array, first: int) -> mx.array:
        """Rows of the product: row i takes row i // k of W1 and row i % k of W2."""
        inner, places = self.inner, mx.arange(first, first + rows.shape[0])
        outer_rows, inner_rows = self.w1[places // inner.shape[0]], inner[places % inner.shape[0]]
        return self.scale * (outer_rows[:, :, None] * inner_rows[:, None, :]).reshape(rows.shape[0], -1)

    def adapter(self) -> Lokr:
        """The same factors."""
        return Lokr(self.w1, self.w2, mx.array(self.scale, mx.float32))

    def plain(self) -> "LokrUpdate":
        """The same as every reader takes it: W2 whole and no scale, where its rank would save nothing."""
        is_low = len(self.w2) == 2 and 2 * self.w2[0].shape[1] < max(self.inner.shape)
        return self if is_low else LokrUpdate(self.w1 * self.scale, (self.inner,), 1.0)

    def unfit(self, shape: tuple[int, int], rank: int, options: LoraOptions) -> str | None:
        """Another factor, or a higher rank than is trained."""
        of_w1, of_w2, is_low = lokr.shape_of(*shape, rank, options.factor)
        if (self.w1.shape, self.inner.shape) != (of_w1, of_w2):
            sizes = (
                f"{p} x {q} times {k} x {n}" for (p, q), (k, n) in ((self.w1.shape, self.inner.shape), (of_w1, of_w2))
            )
            there, here = sizes
            return f"is {there} there and {here} here (lora.factor)"
        if is_low and (self.rank is None or self.rank > rank):
            there = "no rank" if self.rank is None else f"rank {self.rank}"
            return f"has {there} there and {rank} here (lora.rank, lora.ranks)"
        return None

    def start(self, fresh: Adapter) -> Adapter:
        """These factors, filled up with fresh columns of W2's first factor whose rows of the second are zero."""
        assert isinstance(fresh, Lokr)
        times = self.scale / fresh.scale
        if len(fresh.w2) == 1:
            return fresh._replace(w1=self.w1, w2=(self.inner * times,))
        (a, b), rank = self.w2, self.w2[0].shape[1]
        a, b = (
            mx.concatenate([a, fresh.w2[0][:, rank:]], axis=1),
            mx.concatenate([b * times, fresh.w2[1][rank:]], axis=0),
        )
        return fresh._replace(w1=self.w1, w2=(a, b))

    def distance(self, other: Update | None) -> float:
        """Without forming either: the inner product of two Kronecker products is that of their factors."""
        if not isinstance(other, LokrUpdate) or (self.w1.shape, self.inner.shape) != (
            other.w1.shape,
            other.inner.shape,
        ):
            return math.inf
        if self.scale == other.scale and same(self.arrays(), other.arrays()):
            return 0.0
        own, both, theirs = _product(self, self), _product(self, other), _product(other, other)
        if not math.isfinite(own + theirs):
            return math.nan
        return over(math.sqrt(max(own - 2 * both + theirs, 0.0)), math.sqrt(own))


def _product(one: LokrUpdate, other: LokrUpdate) -> float:
    """The sum of the products of all elements."""
    pairs = (one.w1, other.w1), (one.inner, other.inner)
    outer, inner = (float(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64))) for x, y in pairs)
    return one.scale * other.scale * outer * inner
