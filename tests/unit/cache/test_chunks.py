"""Chunks packed and unpacked by calling the codecs, against those of zarr: equal to the byte."""

import json
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from flux2_relay.cache import chunks

RNG = np.random.default_rng(0)
ARRAYS = {
    "text": RNG.integers(0, 0x7000, (3, 400)).astype(np.uint16),
    "latents": RNG.standard_normal((4, 6, 8)).astype(np.float16),
    "masks": RNG.random((40, 6), dtype=np.float32),
}


def by_zarr(kind: str, array: np.ndarray, compressors: list, **changed) -> dict[str, bytes]:
    """The files that zarr makes of an array."""
    files: dict[str, Any] = {}
    settings = {
        "chunks": array.shape,
        "serializer": BytesCodec(endian="little"),
        "fill_value": chunks.FILL_VALUES[array.dtype.name],
        "chunk_key_encoding": {"name": "default", "separator": "."},
        "dimension_names": chunks.DIMENSIONS[kind],
    }
    made: Any = zarr.create_array(
        MemoryStore(files),
        shape=array.shape,
        dtype=array.dtype,
        compressors=compressors,
        zarr_format=3,
        **{**settings, **changed},
    )
    made[...] = array
    return {name: file.to_bytes() for name, file in files.items()}


def blosc(array: np.ndarray, **changed) -> BloscCodec:
    settings: Any = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20, **changed}
    return BloscCodec(typesize=array.itemsize, **settings)


@pytest.mark.parametrize("codec", chunks.CODECS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_chunk_and_metadata_are_those_that_zarr_writes(kind, codec):
    array = ARRAYS[kind]
    node = by_zarr(kind, array, [blosc(array), Crc32cCodec()] if codec == "zstd" else [Crc32cCodec()])
    described = chunks.describe(kind, array.shape, array.dtype.name, codec, {})
    assert json.dumps(described, indent=2).encode() == node["zarr.json"]
    assert chunks.pack(array, codec) == node[chunks.chunk_name(kind)]


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
def test_arrays_of_many_blocks_too(dtype):
    array = RNG.integers(0, 100, (70, 40_000)).astype(dtype)
    packed = chunks.pack(array, "zstd")
    assert packed == by_zarr("text", array, [blosc(array), Crc32cCodec()])["c.0.0"]
    metadata = chunks.describe("text", array.shape, dtype, "zstd", {})
    np.testing.assert_array_equal(chunks.unpack(packed, metadata, "text"), array, strict=True)


@pytest.mark.parametrize("codec", chunks.CODECS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_what_is_ours_is_unpacked_without_zarr_and_equally(monkeypatch, kind, codec):
    array = ARRAYS[kind]
    metadata = chunks.describe(kind, array.shape, array.dtype.name, codec, {"any": 1})
    packed = chunks.pack(array, codec)
    by_reference = chunks._unpack_with_zarr(packed, metadata, kind)
    monkeypatch.setattr(chunks, "_unpack_with_zarr", lambda *arguments: pytest.fail("took the slow way"))
    unpacked = chunks.unpack(packed, json.loads(json.dumps(metadata)), kind)
    for read in (unpacked, by_reference):
        np.testing.assert_array_equal(read, array, strict=True)


FOREIGN = {
    "other settings": lambda array: by_zarr("masks", array, [blosc(array, cname="lz4"), Crc32cCodec()]),
    "another codec": lambda array: by_zarr("masks", array, [ZstdCodec(level=3), Crc32cCodec()]),
    "big-endian": lambda array: by_zarr("masks", array, [Crc32cCodec()], serializer=BytesCodec(endian="big")),
    "another fill value": lambda array: by_zarr("masks", array, [blosc(array), Crc32cCodec()], fill_value=-1.0),
    "no names": lambda array: by_zarr("masks", array, [blosc(array), Crc32cCodec()], dimension_names=None),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_quite_ours_is_left_to_zarr(monkeypatch, foreign):
    array, slow, asked = ARRAYS["masks"], chunks._unpack_with_zarr, []
    monkeypatch.setattr(chunks, "_unpack_with_zarr", lambda *arguments: asked.append(1) or slow(*arguments))
    node = foreign(array)
    read = chunks.unpack(node["c.0.0"], json.loads(node["zarr.json"]), "masks")
    np.testing.assert_array_equal(read, array)
    assert asked == [1]


@pytest.mark.parametrize("codec", chunks.CODECS)
def test_every_flipped_bit_and_every_cut_is_refused(codec):
    array = ARRAYS["text"][:, :8]
    packed = chunks.pack(np.ascontiguousarray(array), codec)
    metadata = chunks.describe("text", array.shape, "uint16", codec, {})
    spoilt = [packed[:length] for length in range(len(packed))]
    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        spoilt.append(bytes(flipped))
    for chunk in spoilt:
        with pytest.raises(ValueError, match="crc32c"):
            chunks.unpack(chunk, metadata, "text")


@pytest.mark.parametrize("codec", chunks.CODECS)
@pytest.mark.parametrize("shape", [(3, 399), (3, 401), (1, 400)])
def test_a_sound_chunk_of_another_size_is_refused(codec, shape):
    packed = chunks.pack(ARRAYS["text"], codec)
    with pytest.raises(ValueError, match="reshape"):
        chunks.unpack(packed, chunks.describe("text", shape, "uint16", codec, {}), "text")


def test_packing_gives_the_same_bytes_every_time():
    array = RNG.integers(0, 0x7000, (64, 40_000)).astype(np.uint16)
    assert len({chunks.pack(array, "zstd") for _ in range(5)}) == 1
