"""An array as the one chunk of a Zarr v3 array, and the metadata that say so: the codecs of the store, called directly.

Zarr itself needs two to four milliseconds for what its codecs do in a fraction of that. So what we write is packed and
unpacked here, in memory; a test compares every byte with what zarr writes. Metadata that are not exactly ours (another
program's, a later version's) are left to zarr.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # numcodecs and zarr take a third of a second to import; `relay --help` must not
    from numcodecs.blosc import Blosc

DIMENSIONS = {"text": ("token", "channel"), "latents": ("y", "x", "channel"), "masks": ("y", "x")}
"""The kinds of entry and what the axes of their arrays mean."""

CODECS = ("zstd", "none")
"""What `codec` may be: blosc with zstd, or plain bytes; both end in a crc32c."""

FILL_VALUES = {"uint16": 65535, "float16": math.nan, "float32": math.nan}
"""What a missing chunk reads as, by stored type: a NaN, which 0xFFFF is in bfloat16."""

_BLOCK_BYTES = 1 << 20  # worth more than four compression levels on real hidden states: 1.42 instead of 1.26
_CHECKSUM_BYTES = 4


def chunk_name(kind: str) -> str:
    """Name of the only chunk of an entry of this kind: c.0.0 or c.0.0.0."""
    return "c" + ".0" * len(DIMENSIONS[kind])


def describe(
    kind: str, shape: Sequence[int], dtype: str, codec: str, attributes: Mapping[str, object]
) -> dict[str, Any]:
    """What the zarr.json of an array says: its kind, shape, stored type (uint16, float16, float32), codec -> dict."""
    fill = FILL_VALUES[dtype]
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if math.isnan(fill) else fill,
        "codecs": _codecs(np.dtype(dtype).itemsize, codec),
        "attributes": dict(attributes),
        "dimension_names": list(DIMENSIONS[kind]),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def pack(array: np.ndarray, codec: str) -> bytes:
    """Encode a contiguous little-endian array -> its chunk: the same bytes each time."""
    data = _blosc(array.itemsize).encode(array) if codec == "zstd" else array.tobytes()
    return b"".join((data, _checksum(data)))


def unpack(chunk: bytes, metadata: Mapping[str, Any], kind: str) -> np.ndarray:
    """Check the crc32c of a chunk and decode it as its zarr.json says -> array, not to be written to.

    ValueError, or whatever zarr and its codecs raise, where it cannot be decoded.
    """
    codec = _codec_of(metadata, kind)
    if codec is None:
        return _unpack_with_zarr(chunk, metadata, kind)
    data = np.frombuffer(chunk, np.uint8)[:-_CHECKSUM_BYTES]
    if _checksum(data) != chunk[-_CHECKSUM_BYTES:]:
        raise ValueError("its crc32c is not that of its bytes")
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    raw = _blosc(dtype.itemsize).decode(data) if codec == "zstd" else data
    return np.frombuffer(raw, dtype).reshape(metadata["shape"])  # which refuses too few bytes, and too many


def _codecs(itemsize: int, codec: str) -> list[dict[str, Any]]:
    blosc = {"typesize": itemsize, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": _BLOCK_BYTES}
    packing = [{"name": "blosc", "configuration": blosc}] if codec == "zstd" else []
    return [{"name": "bytes", "configuration": {"endian": "little"}}, *packing, {"name": "crc32c"}]


def _codec_of(metadata: Mapping[str, Any], kind: str) -> str | None:
    """Which of our codecs a zarr.json describes, if it is exactly as we write it."""
    shape, dtype, attributes = metadata["shape"], metadata["data_type"], metadata["attributes"]
    if dtype not in FILL_VALUES:
        return None
    return next((codec for codec in CODECS if metadata == describe(kind, shape, dtype, codec, attributes)), None)


def _checksum(data: bytes | np.ndarray) -> bytes:
    import google_crc32c

    return google_crc32c.value(data).to_bytes(_CHECKSUM_BYTES, "little")


@cache
def _blosc(itemsize: int) -> "Blosc":
    import numcodecs.blosc as blosc

    blosc.use_threads = False  # several threads lay the blocks down in any order; zarr sets this, too
    return blosc.Blosc(cname="zstd", clevel=1, shuffle=blosc.SHUFFLE, blocksize=_BLOCK_BYTES, typesize=itemsize)


def _unpack_with_zarr(chunk: bytes, metadata: Mapping[str, Any], kind: str) -> np.ndarray:
    import json

    from zarr import open_array
    from zarr.buffer.cpu import Buffer
    from zarr.storage import MemoryStore

    node = {chunk_name(kind): chunk, "zarr.json": json.dumps(metadata).encode()}
    files: Any = {name: Buffer.from_bytes(data) for name, data in node.items()}
    return np.asarray(open_array(MemoryStore(files, read_only=True), mode="r", zarr_format=3)[...])
