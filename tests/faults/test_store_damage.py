"""Damage on disk: every kind of it is refused by name, found by `verify`, repaired by making it missing."""

import errno
import json
import os

import numpy as np
import pytest

from flux2_relay import cache
from flux2_relay.cache import nodes
from flux2_relay.cache.audit import verify
from flux2_relay.cache.errors import StoreError

RNG = np.random.default_rng(0)
KINDS = {
    "text": ({"kind": "text", "dtype": "bfloat16"}, RNG.integers(0, 0x7000, (3, 40)).astype(np.uint16)),
    "latents": ({"kind": "latents", "dtype": "float16"}, RNG.standard_normal((4, 6, 8)).astype(np.float16)),
    "masks": ({"kind": "masks"}, RNG.random((4, 6)).astype(np.float32)),
}


@pytest.fixture(params=["zstd", "none"])
def store(tmp_path, request):
    return cache.open(tmp_path / "store.zarr", "a", codec=request.param, wait=lambda seconds: None)


def _truncate(folder, chunk):
    chunk.write_bytes(chunk.read_bytes()[:-1])


def _empty(folder, chunk):
    chunk.write_bytes(b"")


def _zero(folder, chunk):
    chunk.write_bytes(bytes(chunk.stat().st_size))


def _flip_one_bit(folder, chunk):
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0x10
    chunk.write_bytes(data)


def _lose_the_chunk(folder, chunk):
    chunk.unlink()


def _lose_the_metadata(folder, chunk):
    (folder / "zarr.json").unlink()


def _lose_both(folder, chunk):
    chunk.unlink()
    (folder / "zarr.json").unlink()


def _become_a_file(folder, chunk):
    _lose_both(folder, chunk)
    folder.rmdir()
    folder.write_bytes(b"x")


def _empty_the_metadata(folder, chunk):
    (folder / "zarr.json").write_bytes(b"")


def _truncate_the_metadata(folder, chunk):
    (folder / "zarr.json").write_bytes((folder / "zarr.json").read_bytes()[:-30])


def _take_anothers_chunk(folder, chunk):
    chunk.write_bytes(chunk.read_bytes() + b"more")


def _edit(change):
    def damage(folder, chunk):
        metadata = json.loads((folder / "zarr.json").read_bytes())
        before = json.dumps(metadata)
        change(metadata, metadata["attributes"]["flux2_relay"])
        assert json.dumps(metadata) != before
        (folder / "zarr.json").write_text(json.dumps(metadata))

    return damage


EDITS = {
    "key": _edit(lambda metadata, told: told["key"].update(caption="another")),
    "float in key": _edit(lambda metadata, told: told["key"].update(caption=0.5)),
    "size": _edit(lambda metadata, told: told.update(stored_bytes=told["stored_bytes"] + 1)),
    "shape": _edit(lambda metadata, told: metadata.update(shape=[1, *metadata["shape"][1:]])),
    "axes": _edit(lambda metadata, told: metadata.update(shape=metadata["shape"][:1])),
    "checksum": _edit(lambda metadata, told: metadata["codecs"].pop()),
    "codec": _edit(lambda metadata, told: metadata["codecs"][0].update(name="packbits")),
    "data type": _edit(lambda metadata, told: metadata.update(data_type="int64")),
    "format": _edit(lambda metadata, told: metadata.update(zarr_format=2)),
    "grid is a number": _edit(lambda metadata, told: metadata.update(chunk_grid=3)),
    "no size": _edit(lambda metadata, told: told.pop("stored_bytes")),
    "node": _edit(lambda metadata, told: metadata.update(node_type="group")),
    "attributes": _edit(lambda metadata, told: metadata.update(attributes={})),
    "attributes are a list": _edit(lambda metadata, told: metadata.update(attributes=[])),
    "separator": _edit(lambda metadata, told: metadata["chunk_key_encoding"]["configuration"].update(separator="/")),
    "grid": _edit(
        lambda metadata, told: metadata["chunk_grid"]["configuration"].update(chunk_shape=[1] * len(metadata["shape"]))
    ),
}
FILES = (
    _truncate,
    _empty,
    _zero,
    _flip_one_bit,
    _lose_the_chunk,
    _lose_the_metadata,
    _lose_both,
    _become_a_file,
    _empty_the_metadata,
    _truncate_the_metadata,
    _take_anothers_chunk,
)
DAMAGES = {damage.__name__.strip("_"): damage for damage in FILES} | EDITS


def _publish_all(store):
    keys = {kind: store.publish(kind, key, array, {}) for kind, (key, array) in KINDS.items()}
    store.publish_set({"name": "all", "samples": [{"text": [keys["text"]]}]}, {})
    return keys


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_named_and_repaired(store, damage):
    keys = _publish_all(store)
    assert verify(store).faults == ()
    for kind, key in keys.items():
        folder = store.path / kind / key
        damage(folder, folder / ("c" + ".0" * KINDS[kind][1].ndim))
        with pytest.raises(StoreError) as error:
            store.read(kind, key)
        for words in (f"{kind}/{key} is damaged", "relay cache verify --repair", "relay encode"):
            assert words in str(error.value)

    found = verify(store)
    assert {(fault.kind, fault.key) for fault in found.faults} == set(keys.items())
    assert (found.checked, found.sound, found.missing) == (4, False, {})

    repaired = verify(store, repair=True)
    assert repaired.sound
    assert all(fault.repaired for fault in repaired.faults)
    assert list(repaired.missing.values()) == [1]
    for kind, key in keys.items():
        assert store.keys(kind) == set()
        key_object, array = KINDS[kind]
        assert store.publish(kind, key_object, array, {}) == key
        np.testing.assert_array_equal(store.read(kind, key).array, array, strict=True)
    assert verify(store).faults == ()


@pytest.mark.parametrize("damage", ["lose_the_chunk", "truncate", "empty_the_metadata", "key", "checksum"])
def test_quick_finds_what_needs_no_decoding(store, damage):
    keys = _publish_all(store)
    DAMAGES[damage](store.path / "text" / keys["text"], store.path / "text" / keys["text"] / "c.0.0")
    assert [fault.key for fault in verify(store, full=False).faults] == [keys["text"]]


def _rewrite(store, kind, key, array):
    """Replace an entry's data by zarr itself, so that every checksum but our own is right."""
    import zarr

    metadata = json.loads((store.path / kind / key / "zarr.json").read_bytes())
    opened = zarr.open_array(store.path / kind / key, mode="r+")
    opened[...] = array
    size = (store.path / kind / key / ("c" + ".0" * array.ndim)).stat().st_size
    metadata["attributes"]["flux2_relay"]["stored_bytes"] = size
    (store.path / kind / key / "zarr.json").write_text(json.dumps(metadata))


def test_full_finds_data_that_another_program_has_changed(store):
    keys = _publish_all(store)
    _rewrite(store, "masks", keys["masks"], KINDS["masks"][1] + 1)
    assert verify(store, full=False).faults == ()
    assert [fault.reason for fault in verify(store).faults] == ["its sha256 is not that of its data"]


def test_a_chunk_that_reads_as_fill_is_refused(store):
    keys = _publish_all(store)
    spoilt = KINDS["masks"][1].copy()
    spoilt[0, 0] = np.nan
    _rewrite(store, "masks", keys["masks"], spoilt)
    with pytest.raises(StoreError, match="its first value is the fill value"):
        store.read("masks", keys["masks"])


def test_verify_repairs_a_set_and_says_how_far_it_is(store):
    _publish_all(store)
    (key,) = store.set_keys()
    (store.path / "sets" / key / "zarr.json").write_text("{")
    told = []
    found = verify(store, repair=True, progress=lambda done, total: told.append((done, total)))
    assert [(fault.kind, fault.key, fault.repaired) for fault in found.faults] == [("sets", key, True)]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert store.sets() == []
    assert (found.leftovers, found.missing) == (1, {})


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_what_is_not_the_entrys_fault_is_no_reason_to_repair_it(store, monkeypatch, code):
    keys = _publish_all(store)

    def refuse(folder, name):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(nodes, "_read_in", refuse)
    with pytest.raises(StoreError, match="cannot be read: "):
        store.read("text", keys["text"])
    with pytest.raises(StoreError, match="cannot be read: "):
        verify(store, repair=True)
    assert store.keys("text") == {keys["text"]}


def test_leftovers_are_no_damage(store):
    _publish_all(store)
    (store.path / "tmp" / "0123").mkdir()
    (store.path / "text" / ".DS_Store").write_bytes(b"x")
    found = verify(store)
    assert (found.sound, found.leftovers, found.checked) == (True, 1, 4)
