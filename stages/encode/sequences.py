"""What goes through the decoder layers: rows that run together, each kind with its own way through a layer.

Letters: B captions of a group, n rows, P prefix rows, H hidden, C = taps * H.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache


class Rows(ABC):
    """Hidden states [B, n, H] on their way through the layers, and what was tapped so far."""

    def __init__(self, hidden: mx.array) -> None:
        """Start from the embedding rows [B, n, H]."""
        self.hidden = hidden
        self.taps: list[mx.array] = []

    @property
    def tokens(self) -> int:
        """Captions' tokens in here, as a progress bar counts them."""
        return 0

    @abstractmethod
    def step(self, layer: nn.Module) -> None:
        """Go through one decoder layer."""

    def tap(self) -> None:
        """Keep the hidden states as they stand: raw, not normalised."""
        self.taps.append(self.hidden)

    def tapped(self) -> mx.array:
        """The taps side by side, [B, n, C]."""
        return mx.concatenate(self.taps, axis=-1)


class PrefixRows(Rows):
    """The rows [1, P, H] that stand in front of every caption; leaves their keys and values for the captions."""

    def step(self, layer: nn.Module) -> None:
        """Causal attention among the prefix."""
        cache = KVCache()
        self.hidden = layer(self.hidden, "causal", cache)
        self._kept = cast(tuple[mx.array, mx.array], cache.keys_and_values())

    def cache_for(self, captions: int) -> KVCache:
        """A cache that holds the prefix's keys and values of the current layer, for a group of captions."""
        cache = KVCache()
        cache.update_and_fetch(*(mx.repeat(kept, captions, axis=0) for kept in self._kept))
        return cache


class PadRow(Rows):
    """The one row [1, 1, H] that stands for every pad on the left.

    The reference masks it from everything, itself included, and its attention then gives exactly zero. (MLX's own
    attention over an all-masked row gives the mean of the values instead.)
    """

    def step(self, layer: nn.Module) -> None:
        """x + MLP(norm(x))."""
        mlp, norm = cast(nn.Module, layer.mlp), cast(nn.Module, layer.post_attention_layernorm)
        self.hidden = self.hidden + mlp(norm(self.hidden))


class CaptionRows(Rows):
    """Captions of a group: `indices` says which, `lengths` how many real tokens each has."""

    def __init__(self, indices: Sequence[int], lengths: Sequence[int], hidden: mx.array) -> None:
        """Rows beyond a caption's length are filling: causality keeps them out of the real ones."""
        super().__init__(hidden)
        self.indices, self.lengths = indices, lengths

    def results(self) -> Iterator[tuple[int, mx.array]]:
        """(index, rows to keep) of every caption of the group."""
        tapped = self.tapped()
        for row, (index, length) in enumerate(zip(self.indices, self.lengths, strict=True)):
            yield index, tapped[row, : self._kept(length)]

    @property
    def tokens(self) -> int:
        """The rows that are kept."""
        return sum(map(self._kept, self.lengths))

    def _kept(self, length: int) -> int:
        return length


class OwnRows(CaptionRows):
    """A caption's own tokens behind the shared prefix."""

    def __init__(self, indices: Sequence[int], lengths: Sequence[int], hidden: mx.array, prefix: PrefixRows) -> None:
        """`prefix` must go through each layer before these rows do."""
        super().__init__(indices, lengths, hidden)
        self._prefix = prefix

    def step(self, layer: nn.Module) -> None:
        """Causal attention to the prefix and to the rows before."""
        self.hidden = layer(self.hidden, "causal", self._prefix.cache_for(len(self.indices)))


class AllRows(CaptionRows):
    """All rows of each caption, pads on the right: a pad sees the caption's real tokens and nothing else."""

    def __init__(self, indices: Sequence[int], lengths: Sequence[int], hidden: mx.array) -> None:
        """The mask [B, 1, T, longest] follows from the lengths."""
        super().__init__(indices, lengths, hidden)
        self._width = hidden.shape[1]
        rows, keys = np.arange(self._width)[:, None], np.arange(max(lengths))[None]
        real = keys[None] < np.array(lengths)[:, None, None]
        self._mask = mx.array((real & (keys <= rows))[:, None].astype(np.uint8)).astype(mx.bool_)

    def step(self, layer: nn.Module) -> None:
        """Attention to real keys only."""
        self.hidden = layer(self.hidden, self._mask, _RealKeys(self._mask.shape[-1]))

    def _kept(self, length: int) -> int:
        return self._width


class _RealKeys(KVCache):
    """Keeps the keys and values of the first `count` rows, where all real tokens stand; pads have none."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys[:, :, : self._count], values[:, :, : self._count]
