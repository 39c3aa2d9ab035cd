"""Stored entries to arrays that the transformer takes: contexts whole again, latents as tokens.

Letters: L image tokens, T text rows, C context channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flux2_relay.cache import Entry, Store
from flux2_relay.cache.errors import InputError
from flux2_relay.stages.context import assemble
from flux2_relay.stages.train.transformer import image_ids


def to_mlx(entry: Entry) -> mx.array:
    """An entry's array with its logical type: bfloat16 is stored as its bits."""
    array = mx.array(entry.array)
    return array.view(mx.bfloat16) if entry.dtype == "bfloat16" else array


@dataclass(frozen=True, slots=True)
class Contexts:
    """Reads captions' entries of one set and puts the shared rows around them."""

    store: Store
    empty: str  # key of the empty caption
    prefix: mx.array | None  # [P, C], None where entries hold all rows
    pad: mx.array | None  # [1, C]
    length: int  # text rows T

    def read(self, key: str) -> Entry:
        """The stored rows of one caption; safe to call from any thread."""
        return self.store.read("text", key)

    def whole(self, entry: Entry) -> mx.array:
        """The context [T, C] of an entry, in the stored type."""
        rows = to_mlx(entry)
        if self.prefix is None or self.pad is None:
            return rows
        return assemble(rows, self.prefix, self.pad, self.length)

    def context(self, key: str) -> mx.array:
        """The context [T, C] under `key`."""
        return self.whole(self.read(key))


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


def tokens(entry: Entry) -> mx.array:
    """Stored latents [h, w, 128] -> tokens [L, 128] float32, row-major."""
    latents = to_mlx(entry)
    return latents.reshape(-1, latents.shape[-1]).astype(mx.float32)


def reference_ids(sizes: Sequence[tuple[int, int]]) -> mx.array:
    """Position ids [R, 4] of reference images of these (rows, columns), one behind the other."""
    return mx.concatenate([image_ids(*size, time=10 + 10 * k) for k, size in enumerate(sizes)])


def size_of(entry: Entry) -> tuple[int, int]:
    """Rows and columns of stored latents, in tokens."""
    height, width = np.shape(entry.array)[:2]
    return int(height), int(width)
