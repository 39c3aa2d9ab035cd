"""One entry as files: an array and what is known about it, to and from a Zarr v3 node in memory.

A node is `{"c.0.0": chunk, "zarr.json": metadata}`, in the order of writing.

bfloat16 is stored as its uint16 bits, which every Zarr tool opens; the logical type stands in the attributes.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from flux2_relay.cache import chunks
from flux2_relay.cache.chunks import CODECS, DIMENSIONS, chunk_name
from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import key_of

_EXPONENT = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00), "float32": np.uint32(0x7F800000)}
# All ones: infinity or NaN.


class Damage(Exception):
    """Why a node is not what it should be, in words; the store adds its name and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What an entry's zarr.json says."""

    shape: tuple[int, ...]
    dtype: str
    """Logical type: bfloat16, float16 or float32."""
    attributes: Mapping[str, Any]
    """dtype (bfloat16 only), key, sha256, stored_bytes, made."""

    @property
    def raw_bytes(self) -> int:
        """Size of the decoded array."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One array of the store and what is known about it."""

    array: np.ndarray
    """float16, float32, or uint16 holding bfloat16 bits."""
    attributes: Mapping[str, Any]
    """dtype (bfloat16 only), key, sha256, stored_bytes, made."""

    @property
    def dtype(self) -> str:
        """Logical type: bfloat16, float16 or float32."""
        return self.attributes.get("dtype", self.array.dtype.name)


def build(
    kind: str, key_object: Mapping[str, object], array: np.ndarray, made: Mapping[str, object], codec: str
) -> dict[str, bytes]:
    """Encode an entry: array [token, channel], [y, x, channel] or [y, x] -> its two files, chunk first.

    float16 or float32; or uint16 bits with key_object["dtype"] == "bfloat16". InputError for anything else
    and for values that are not finite: a NaN that is read back always means damage.
    """
    dtype = _logical_dtype(key_object, array)
    _refuse_shape(kind, array)
    _refuse_not_finite(array, dtype)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    with ThreadPoolExecutor(1) as pool:  # hashing and compressing both free the GIL
        sha256 = pool.submit(digest, dtype, array)
        chunk = chunks.pack(array, codec)
    told: dict[str, Any] = {"key": dict(key_object), "sha256": sha256.result(), "stored_bytes": len(chunk)}
    if dtype == "bfloat16":
        told["dtype"] = dtype
    attributes = {"flux2_relay": {**told, "made": plain(made)}}
    metadata = chunks.describe(kind, array.shape, array.dtype.name, codec, attributes)
    return {chunk_name(kind): chunk, "zarr.json": _indented(metadata)}


def build_group(attributes: Mapping[str, object]) -> bytes:
    """Encode a group: its attributes -> its zarr.json."""
    return _indented({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def parse_header(zarr_json: bytes, kind: str, key: str, chunk_bytes: int | None = None) -> Header:
    """Check all that the metadata alone can show: zarr.json [and the chunk's size] -> Header, or Damage."""
    return _header(parse_object(zarr_json), kind, key, chunk_bytes)


def decode(node: Mapping[str, bytes], kind: str, key: str) -> Entry:
    """Decode an entry and check its crc32c, not its sha256: its two files -> Entry, or Damage."""
    chunk, metadata = node[chunk_name(kind)], parse_object(node["zarr.json"])
    header = _header(metadata, kind, key, len(chunk))
    try:
        array = chunks.unpack(chunk, metadata, kind)
    except MemoryError:
        raise
    except Exception as error:  # whatever zarr and its codecs think of a broken file
        raise Damage(f"it cannot be decoded ({type(error).__name__}: {error})") from error
    if _is_fill(array):  # Zarr answers a chunk that is not there with fill values and no error
        raise Damage("its first value is the fill value, so its chunk is lost or emptied")
    return Entry(array=array, attributes=header.attributes)


def check_content(entry: Entry) -> None:
    """Compare an entry with its own sha256, which binds type, shape and data, or raise Damage."""
    if digest(entry.dtype, entry.array) != entry.attributes.get("sha256"):
        raise Damage("its sha256 is not that of its data")
    if count_not_finite(entry.array, entry.dtype):
        raise Damage("it holds values that are not finite")


def digest(dtype: str, array: np.ndarray) -> str:
    """Hash an array -> sha256 of "logical dtype|d0,d1,...|" and the little-endian bytes."""
    head = f"{dtype}|{','.join(map(str, array.shape))}|"
    sha = hashlib.sha256(head.encode())
    sha.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
    return sha.hexdigest()


def count_not_finite(array: np.ndarray, dtype: str) -> int:
    """Count infinities and NaNs; `dtype` is the logical type, bfloat16 comes as uint16 bits."""
    mask = _EXPONENT[dtype]
    bits = array.view(mask.dtype.newbyteorder(array.dtype.byteorder))  # quicker than isfinite, thrice so in float16
    return int(np.count_nonzero((bits & mask) == mask))


def adopt(kind: str, node: Mapping[str, bytes], chunk: bytes) -> dict[str, bytes]:
    """Describe another writer's chunk of the same entry: our node, their chunk -> node, or Damage.

    Their bits may differ from ours in the last place, and their codec need not be ours.
    """
    ours = json.loads(node["zarr.json"])
    told = ours["attributes"]["flux2_relay"]
    for codec in CODECS:
        theirs = chunks.describe(kind, ours["shape"], ours["data_type"], codec, ours["attributes"])
        try:
            found = chunks.unpack(chunk, theirs, kind)
        except Exception:  # another codec, or no chunk at all
            continue
        told |= {"sha256": digest(told.get("dtype", found.dtype.name), found), "stored_bytes": len(chunk)}
        return {chunk_name(kind): chunk, "zarr.json": _indented(theirs)}
    raise Damage("it cannot be decoded")


def file_names(kind: str) -> tuple[str, str]:
    """Names of an entry's two files, in the order in which they are written: the chunk, then zarr.json."""
    return chunk_name(kind), "zarr.json"


def plain(made: Mapping[str, object]) -> dict[str, object]:
    """Copy what is told about an entry's making, refusing what strict JSON cannot carry (NaN, arrays)."""
    return json.loads(json.dumps(dict(made), allow_nan=False))


def parse_object(zarr_json: bytes) -> dict[str, Any]:
    """Parse a zarr.json of format 3 -> dict, or Damage."""
    try:
        metadata = json.loads(zarr_json)
    except ValueError as error:
        raise Damage(f"its zarr.json is not JSON ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("zarr_format") != 3:
        raise Damage("its zarr.json is not Zarr format 3")
    if not isinstance(metadata.get("attributes", {}), dict):
        raise Damage("its zarr.json has no attributes")
    return metadata


def _indented(metadata: Mapping[str, object]) -> bytes:
    return json.dumps(metadata, indent=2).encode()


def _header(metadata: Mapping[str, Any], kind: str, key: str, chunk_bytes: int | None) -> Header:
    try:
        return _described(metadata, kind, key, chunk_bytes)
    except (AttributeError, KeyError, TypeError) as error:  # JSON, but of another structure
        raise Damage(f"its zarr.json is not that of an entry ({error})") from error


def _described(metadata: Mapping[str, Any], kind: str, key: str, chunk_bytes: int | None) -> Header:
    told = metadata.get("attributes", {}).get("flux2_relay")
    if metadata.get("node_type") != "array" or not isinstance(told, dict) or not isinstance(told.get("key"), dict):
        raise Damage("its zarr.json does not describe an entry of this program")
    _compare_name(told["key"], key)
    shape = metadata.get("shape")
    grid = metadata.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape")
    if not _is_shape(shape, len(DIMENSIONS[kind])) or shape != grid:
        raise Damage(f"its zarr.json gives shape {shape} in chunks of {grid}")
    if [codec.get("name") for codec in metadata.get("codecs", [])][-1:] != ["crc32c"]:
        raise Damage("its zarr.json names no checksum")
    if type(told["stored_bytes"]) is not int or chunk_bytes not in (None, told["stored_bytes"]):
        raise Damage(f"its chunk has {chunk_bytes} bytes instead of {told['stored_bytes']}")
    return Header(shape=tuple(shape), dtype=_told_dtype(metadata, told), attributes=told)


def _is_shape(shape: object, axes: int) -> TypeGuard[list[int]]:
    return isinstance(shape, list) and len(shape) == axes and all(type(size) is int and size > 0 for size in shape)


def _logical_dtype(key_object: Mapping[str, object], array: np.ndarray) -> str:
    stored, declared = array.dtype.name, key_object.get("dtype")
    if stored == "uint16" and declared == "bfloat16":
        return "bfloat16"
    if stored not in ("float16", "float32"):
        raise InputError(
            f"an array of {stored} with key dtype {declared!r} cannot be stored; "
            "entries are float16, float32, or uint16 bits with key dtype 'bfloat16'"
        )
    if declared not in (None, stored):
        raise InputError(f"the array is {stored}, its key says dtype {declared!r}")
    return stored


def _refuse_shape(kind: str, array: np.ndarray) -> None:
    if array.ndim != len(DIMENSIONS[kind]) or not array.size:
        axes = ", ".join(DIMENSIONS[kind])
        raise InputError(f"{kind} entries have axes [{axes}], none of them empty; this array has shape {array.shape}")


def _refuse_not_finite(array: np.ndarray, dtype: str) -> None:
    bad = count_not_finite(array, dtype)
    if bad:
        raise InputError(
            f"{bad} of {array.size} values are not finite (NaN or infinity), so nothing was stored; "
            "compute in a wider type, or look at the weights"
        )


def _told_dtype(metadata: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    stored, declared = metadata.get("data_type"), told["key"].get("dtype")
    dtype = told.get("dtype", stored)
    wanted = "uint16" if dtype == "bfloat16" else dtype
    if stored not in (wanted, dtype) or dtype not in ("bfloat16", "float16", "float32"):
        raise Damage(f"its zarr.json gives data_type {stored} for {dtype}")
    if declared not in (None, dtype):
        raise Damage(f"its zarr.json gives type {dtype}, its key {declared}")
    return dtype


def _compare_name(key_object: Mapping[str, object], key: str) -> None:
    try:
        name = key_of(key_object)
    except (TypeError, InputError) as error:
        raise Damage(f"its key object is no key ({error})") from error
    if name != key:
        raise Damage(f"its key object hashes to {name}")


def _is_fill(array: np.ndarray) -> bool:
    first = array.reshape(-1)[0]
    return bool(first == 65535) if array.dtype.name == "uint16" else bool(np.isnan(first))
