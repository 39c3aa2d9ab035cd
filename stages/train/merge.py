"""Base and adapters as one transformer: W + the sum of what each update changes, in float32, rounded once.

A stretch of rows at a time, from the checkpoint's files to the new ones: neither the model nor, unless it is made of
8-bit floats, one of its matrices is ever whole in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import names
from flux2_relay.stages.shards import SHARD_BYTES, Shards
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.mixing import Changes
from flux2_relay.stages.train.transformer import tensor_shapes
from flux2_relay.stages.weights import TensorInfo, Tensors

STRETCH_BYTES = 1 << 24
"""Bytes of float32 that are worked on at a time."""
_STORED: Mapping[str, tuple[type, mx.Dtype]] = {  # numpy knows no bfloat16: its bits go as integers
    "F32": (np.uint32, mx.float32),
    "F16": (np.uint16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
}


def plan(spec: TransformerSpec, dtype: Literal["BF16", "F32"], most_bytes: int = SHARD_BYTES) -> Shards:
    """The files of a merged transformer."""
    return Shards(shapes=tensor_shapes(spec), dtype=dtype, most_bytes=most_bytes)


def open_dense(place: Path, spec: TransformerSpec) -> Tensors:
    """The transformer in a folder or file under diffusers' names; InputError where it is another, or packed by MLX."""
    base = names.open_transformer(place)
    if any(name.endswith(".scales") for name in base.info):
        raise InputError(f"{place}: is quantized by MLX; adapters are merged into the checkpoint that it was made from")
    base.check(tensor_shapes(spec))
    return base


def merge(
    base: Tensors, changes: Mapping[str, Changes], shards: Shards, folder: Path, progress: Callable[[int], object]
) -> None:
    """Write the transformer `base` (of `open_dense`), changed, into `folder`, and check what stands there.

    `changes` are by module path (`mixing.changes_of`). `progress` is told bytes written.
    """

    def bytes_of(name: str) -> Iterator[bytes]:
        for rows in _merged(stretches(base, name), changes.get(name.removesuffix(".weight"), ())):
            piece = _bytes(rows, shards.dtype)
            progress(len(piece))
            yield piece

    shards.write(folder, bytes_of)
    names.open_transformer(folder).check(shards.shapes)


def _merged(stretches: Iterator[mx.array], changes: Changes) -> Iterator[mx.array]:
    """Rows of W and its changes, float32."""
    first = 0
    for rows in stretches:
        value = own = rows.astype(mx.float32)
        for update, strength in changes:
            value = value + strength * update.change(own, first)
        first += rows.shape[0]
        yield value


def _bytes(rows: mx.array, dtype: str) -> bytes:
    bits, kind = _STORED[dtype]
    return np.array(rows.astype(kind).view(mx.uint32 if bits is np.uint32 else mx.uint16)).tobytes()


def stretches(base: Tensors, name: str) -> Iterator[mx.array]:
    """The rows of a tensor in order, as they are stored; a vector's elements count as rows."""
    info = base.info[name]
    columns = int(np.prod(info.shape[1:], dtype=np.int64))
    most = max(1, STRETCH_BYTES // (4 * columns))
    if info.dtype not in _STORED:
        whole = base.read(name, mx.float32)
        yield from (whole[first : first + most] for first in range(0, info.shape[0], most))
        return
    bits, kind = _STORED[info.dtype]
    for data in _pieces(info, most * columns * np.dtype(bits).itemsize):
        yield mx.array(np.frombuffer(data, bits)).view(kind).reshape(-1, *info.shape[1:])


def _pieces(info: TensorInfo, most: int) -> Iterator[bytes]:
    """A tensor's bytes in its own order, at most so many at a time."""
    with open(info.file, "rb") as file:
        for start, end in info.ranges:
            file.seek(start)
            for at in range(start, end, most):
                data = file.read(min(most, end - at))
                if len(data) < min(most, end - at):
                    raise InputError(f"{info.file} became shorter while it was read")
                yield data
