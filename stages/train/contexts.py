"""Stored entries to arrays that the transformer takes: contexts whole again, latents as tokens.

Letters: L image tokens, T text rows, C context channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from flux2_relay.cache import Entry, Store
from flux2_relay.cache.errors import InputError
from flux2_relay.stages.context import assemble
from flux2_relay.stages.train.transformer import image_ids


class Stored(NamedTuple):
    """An entry's array as it is stored, in MLX's memory.

    Made by a copy, not by an operation: MLX computes in the thread in which an operation was asked for, so this may be
    made in any thread and used in another.
    """

    array: mx.array
    is_bfloat16: bool  # whose bits `array` then holds, as uint16


def stored(entry: Entry) -> Stored:
    """Copy an entry into MLX's memory; safe to call from any thread."""
    return Stored(mx.array(entry.array), entry.dtype == "bfloat16")


def typed(entry: Stored) -> mx.array:
    """The array with its logical type."""
    return entry.array.view(mx.bfloat16) if entry.is_bfloat16 else entry.array


def to_mlx(entry: Entry) -> mx.array:
    """An entry's array with its logical type: bfloat16 is stored as its bits."""
    return typed(stored(entry))


@dataclass(frozen=True, slots=True)
class Contexts:
    """Reads captions' entries of one set and puts the shared rows around them."""

    store: Store
    empty: str  # key of the empty caption
    prefix: mx.array | None  # [P, C], None where entries hold all rows
    pad: mx.array | None  # [1, C]
    length: int  # text rows T

    def whole(self, entry: Stored) -> mx.array:
        """The context [T, C] of an entry, in the stored type."""
        rows = typed(entry)
        if self.prefix is None or self.pad is None:
            return rows
        return assemble(rows, self.prefix, self.pad, self.length)

    def context(self, key: str) -> mx.array:
        """The context [T, C] under `key`."""
        return self.whole(stored(self.store.read("text", key)))


def open_contexts(store: Store, body: Mapping[str, object], context_width: int) -> Contexts:
    """The contexts of a set; InputError where they are not as wide as the transformer reads."""
    shared = body["shared"]
    assert isinstance(shared, Mapping)
    empty = store.read("text", shared["empty"])
    if empty.array.shape[-1] != context_width:
        raise InputError(
            f"{store.name}: the captions of this set have {empty.array.shape[-1]} channels, but the transformer of "
            f"model.path reads {context_width}: they were encoded for another model. Run `relay encode`."
        )
    prefix, pad = (to_mlx(store.read("text", shared[name])) if shared.get(name) else None for name in ("prefix", "pad"))
    key = empty.attributes["key"]
    return Contexts(store, shared["empty"], prefix, pad, int(key["max_length"]))


def tokens(entry: Stored) -> mx.array:
    """Stored latents [h, w, 128] -> tokens [L, 128] float32, row-major."""
    latents = typed(entry)
    return latents.reshape(-1, latents.shape[-1]).astype(mx.float32)


def reference_ids(sizes: Sequence[tuple[int, int]]) -> mx.array:
    """Position ids [R, 4] of reference images of these (rows, columns), one behind the other."""
    return mx.concatenate([image_ids(*size, time=10 + 10 * k) for k, size in enumerate(sizes)])


def size_of(entry: Entry) -> tuple[int, int]:
    """Rows and columns of stored latents, in tokens."""
    height, width = np.shape(entry.array)[:2]
    return int(height), int(width)
