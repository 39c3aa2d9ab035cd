"""A DoRA of a file: a low-rank update, and the length that each row of the sum is brought to.

ComfyUI divides by the length of the base's row where others divide by that of the sum, so the number in its files is
another for the same weights; which of the two a file means stands in its header (`OVER_BASE`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train.dora import Dora
from flux2_relay.stages.train.kinds import Adapter
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.updates import Factors, Update, over, same

OVER_BASE = {"flux2_relay.dora_over": "base"}
"""Header of a file whose lengths are divided by those of the base's rows."""
_LEAST = 1e-12


@dataclass(frozen=True, slots=True)
class DoraUpdate:
    """y_i = m_i (W + s B A)_i / |(W + s B A)_i|, or over |W_i|; m [out] float32."""

    kind: ClassVar[str] = "dora"
    low: Factors
    magnitude: mx.array
    over_base: bool = False
    squares: mx.array | None = None
    """|W|^2 [out] of the base's rows, where they have been measured."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.low.rank

    @property
    def strength(self) -> float:
        """alpha / rank."""
        return self.low.scale

    def arrays(self) -> tuple[mx.array, ...]:
        """A, B and m."""
        return *self.low.arrays(), self.magnitude

    def is_zero(self) -> bool:
        """Whether B is; m moves from the lengths that it began as when B does."""
        return self.low.is_zero()

    def change(self, rows: mx.array, first: int) -> mx.array:
        """What the rows become, less what they are."""
        summed = rows + self.low.change(rows, first)
        lengths = _lengths(rows if self.over_base else summed)
        factor = self.magnitude[first : first + rows.shape[0]] / mx.maximum(lengths, _LEAST)
        return factor[:, None] * summed - rows

    def adapter(self) -> Dora:
        """The same factors, over a base that was measured."""
        assert self.squares is not None
        assert not self.over_base
        low = self.low.adapter()
        return Dora(low.a, low.b, low.scale, self.magnitude, self.squares)

    def measured(self, stretches: Iterable[mx.array], over_base: bool = False) -> "DoraUpdate":
        """The same over a base, whose rows come in `stretches` [n, in] float32, in the form that is asked for."""
        of_base, of_sum, first = [], [], 0
        for rows in stretches:
            of_base.append(_lengths(rows))
            of_sum.append(_lengths(rows + self.low.change(rows, first)))
            mx.eval(of_base[-1], of_sum[-1])
            first += rows.shape[0]
        base, summed = (mx.maximum(mx.concatenate(x), _LEAST) for x in (of_base, of_sum))
        ratio = {(False, True): base / summed, (True, False): summed / base}.get((self.over_base, over_base))
        magnitude = self.magnitude if ratio is None else self.magnitude * ratio
        return replace(self, magnitude=magnitude, over_base=over_base, squares=mx.square(base))

    def unfit(self, shape: tuple[int, int], rank: int, options: LoraOptions) -> str | None:
        """As for LoRA."""
        return self.low.unfit(shape, rank, options)

    def start(self, fresh: Adapter) -> Adapter:
        """As for LoRA, with these lengths."""
        assert isinstance(fresh, Dora)
        started = self.low.start(fresh.low)
        return fresh.with_weights({**started.weights(), "lora_magnitude_vector": self.magnitude})

    def distance(self, other: Update | None) -> float:
        """The larger of those of the low-rank updates and of the lengths."""
        if not isinstance(other, DoraUpdate) or self.over_base != other.over_base:
            return float("inf")
        if same((self.magnitude,), (other.magnitude,)):
            return self.low.distance(other.low)
        mine, theirs = (np.asarray(x.magnitude, np.float64) for x in (self, other))
        of_lengths = over(float(np.linalg.norm(mine - theirs)), float(np.linalg.norm(mine)))
        return float(np.max([self.low.distance(other.low), of_lengths]))  # which is nan where one is


def _lengths(rows: mx.array) -> mx.array:
    return mx.linalg.norm(rows, axis=-1)
