"""What an adapter file does to one linear, apart from how the file names it; and plain LoRA, the first of the kinds.

Where `kinds.py` has what is trained, this has what is read, compared, merged and written: `dora_update.py` and
`lokr_update.py` are the other two. Lengths and distances are Frobenius norms, in float64.

Letters: r rank; W [out, in].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train.kinds import Adapter, Lora
from flux2_relay.stages.train.options import LoraOptions


class Update(Protocol):
    """One module's update."""

    kind: ClassVar[str]
    """The `lora.kind` that trains such a one."""

    @property
    def rank(self) -> int | None:
        """Of its low-rank factors; None where it has none."""
        ...

    @property
    def strength(self) -> float:
        """What multiplies its factors."""
        ...

    def arrays(self) -> tuple[mx.array, ...]:
        """All that it holds."""
        ...

    def is_zero(self) -> bool:
        """Whether it changes nothing, as before the first step."""
        ...

    def change(self, rows: mx.array, first: int) -> mx.array:
        """What is added to `rows` [n, in] float32 of the base's matrix, the first of which is row `first` of it."""
        ...

    def adapter(self) -> Adapter:
        """It as something to attach to the base."""
        ...

    def unfit(self, shape: tuple[int, int], rank: int, options: LoraOptions) -> str | None:
        """Why a training of these options cannot take it over whole, as what stands behind the module's path."""
        ...

    def start(self, fresh: Adapter) -> Adapter:
        """A fresh adapter that does what this does."""
        ...

    def distance(self, other: "Update | None") -> float:
        """The norm of the difference over that of this; to nothing where `other` is None."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's low-rank update, scale * B A: A [r, in] and B [out, r] float32."""

    kind: ClassVar[str] = "lora"
    a: mx.array
    b: mx.array
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def strength(self) -> float:
        """alpha / rank."""
        return self.scale

    def arrays(self) -> tuple[mx.array, ...]:
        """A and B."""
        return self.a, self.b

    def is_zero(self) -> bool:
        """Whether B is."""
        return not np.any(np.asarray(self.b))

    def change(self, rows: mx.array, first: int) -> mx.array:
        """Rows of scale * B A."""
        return (self.scale * self.b[first : first + rows.shape[0]]) @ self.a

    def adapter(self) -> Lora:
        """The same factors."""
        return Lora(self.a, self.b, mx.array(self.scale, mx.float32))

    def scaled(self, strength: float) -> Self:
        """The update times `strength`."""
        return type(self)(self.a, self.b * (self.scale * strength), 1.0)

    def unfit(self, shape: tuple[int, int], rank: int, options: LoraOptions) -> str | None:
        """A higher rank than is trained would lose something."""
        if self.rank > rank:
            return f"has rank {self.rank} there and {rank} here (lora.rank, lora.ranks)"
        return None

    def start(self, fresh: Adapter) -> Adapter:
        """These factors, filled up with fresh rows of A whose columns of B are zero; the strength is settled in B."""
        assert isinstance(fresh, Lora)
        b = self.b * (self.scale / fresh.scale)
        return fresh.with_weights(
            {
                "lora_A.weight": mx.concatenate([self.a, fresh.a[self.rank :]], axis=0),
                "lora_B.weight": mx.concatenate([b, fresh.b[:, self.rank :]], axis=1),
            }
        )

    def distance(self, other: Update | None) -> float:
        """Without forming either: the difference of two products is one, s B A - s' B' A' = [s B, -s' B'] [A; A']."""
        if isinstance(other, Factors) and self.scale == other.scale and same(self.arrays(), other.arrays()):
            return 0.0
        if not isinstance(other, Factors | None):
            return math.inf
        return over(_norm(self, other), _norm(self))


def same(one: tuple[mx.array, ...], other: tuple[mx.array, ...]) -> bool:
    """Whether two updates hold the same numbers."""
    return len(one) == len(other) and all(
        np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(one, other, strict=True)
    )


def over(distance: float, size: float) -> float:
    """A distance relative to what is expected; infinite where nothing is and something was found."""
    if size == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / size


def _norm(first: Factors, second: Factors | None = None) -> float:
    """The norm of the first less the second: of P Q, the root of the sum of (P^T P) * (Q Q^T)."""
    there = [(part, sign) for part, sign in ((first, 1), (second, -1)) if part is not None]
    a = np.concatenate([np.asarray(part.a, np.float64) for part, _ in there])
    b = np.concatenate([sign * part.scale * np.asarray(part.b, np.float64) for part, sign in there], axis=1)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    return math.sqrt(max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0))


Updates = Mapping[str, Update]
"""What one file does: module path -> its update."""
