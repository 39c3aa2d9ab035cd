"""The store's plain behaviour: what is written, what is read, what is refused at the door."""

import errno
import hashlib
import json
import os
import sys

import numpy as np
import pytest
import zarr

from flux2_relay import cache
from flux2_relay.cache import durable
from flux2_relay.cache.errors import InputError, StoreError
from flux2_relay.cache.keys import key_of
from flux2_relay.cache.store import KINDS

RNG = np.random.default_rng(0)
BITS = (RNG.standard_normal((5, 24)).astype("<f4").view("<u4") >> 16).astype("<u2")
LATENTS = RNG.standard_normal((4, 6, 8)).astype(np.float16)
MASK = RNG.random((4, 6)).astype(np.float32)
ENTRIES = [
    ("text", {"kind": "text", "dtype": "bfloat16", "caption": "ein Fuchs, süß"}, BITS, "bfloat16"),
    ("text", {"kind": "text", "dtype": "float32", "caption": ""}, BITS.astype(np.float32), "float32"),
    ("latents", {"kind": "latents", "dtype": "float16", "source": "s"}, LATENTS, "float16"),
    ("masks", {"kind": "masks", "source": "s"}, MASK, "float32"),
]


@pytest.fixture
def store(tmp_path):
    return cache.open(tmp_path / "store.zarr", "a", wait=lambda seconds: None)


def _files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("kind", "key_object", "array", "dtype"), ENTRIES)
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_what_is_published_is_read_back(tmp_path, kind, key_object, array, dtype, codec):
    store = cache.open(tmp_path / "new" / "store.zarr", "a", codec=codec)
    key = store.publish(kind, key_object, array, {"at": "now", "seconds": 0.5})
    entry = cache.open(store.path).read(kind, key)
    assert key == key_of(key_object)
    assert store.keys(kind) == {key}
    assert store.has(kind, key)
    np.testing.assert_array_equal(entry.array, array, strict=True)
    assert entry.dtype == dtype
    assert entry.attributes["key"] == key_object
    assert entry.attributes["made"] == {"at": "now", "seconds": 0.5}
    assert store.header(kind, key).raw_bytes == array.nbytes
    assert store.header(kind, key).shape == array.shape


def test_layout_and_metadata_are_those_of_the_format(store):
    key = store.publish("text", ENTRIES[0][1], BITS, {})
    groups = [f"{name}/zarr.json" for name in ("latents", "masks", "sets", "text", "tmp")]
    assert _files(store.path) == sorted([*groups, f"text/{key}/c.0.0", f"text/{key}/zarr.json", "zarr.json"])
    root = json.loads((store.path / "zarr.json").read_bytes())
    assert root["attributes"] == {"format": "flux2-relay-cache", "version": 1}
    metadata = json.loads((store.path / "text" / key / "zarr.json").read_bytes())
    told = metadata.pop("attributes")["flux2_relay"]
    blosc = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": 2, "blocksize": 1048576}
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [5, 24],
        "data_type": "uint16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [5, 24]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 65535,
        "dimension_names": ["token", "channel"],
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": blosc},
            {"name": "crc32c"},
        ],
    }
    assert {name: metadata[name] for name in expected} == expected
    assert told == {
        "dtype": "bfloat16",
        "key": ENTRIES[0][1],
        "sha256": hashlib.sha256(b"bfloat16|5,24|" + BITS.tobytes()).hexdigest(),
        "stored_bytes": (store.path / "text" / key / "c.0.0").stat().st_size,
        "made": {},
    }


def test_floats_have_a_nan_for_fill_and_no_logical_type_of_their_own(store):
    key = store.publish("latents", ENTRIES[2][1], LATENTS, {})
    metadata = json.loads((store.path / "latents" / key / "zarr.json").read_bytes())
    assert metadata["fill_value"] == "NaN"
    assert metadata["dimension_names"] == ["y", "x", "channel"]
    assert "dtype" not in metadata["attributes"]["flux2_relay"]


def test_zarr_opens_the_store_as_one_hierarchy_without_a_warning(store):
    keys = {kind: store.publish(kind, key_object, array, {}) for kind, key_object, array, _ in ENTRIES[1:]}
    group = zarr.open_group(store.path, mode="r")
    for kind, _, array, _ in ENTRIES[1:]:
        assert [name for name, _ in group.members(max_depth=1) if name.startswith(f"{kind}/")] == [
            f"{kind}/{keys[kind]}"
        ]
        read = zarr.open_array(store.path, path=f"{kind}/{keys[kind]}", mode="r")[...]
        np.testing.assert_array_equal(read, array, strict=True)


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_tensorstore_reads_the_same_arrays(tmp_path, codec):
    tensorstore = pytest.importorskip("tensorstore")
    store = cache.open(tmp_path / "store.zarr", "a", codec=codec)
    for kind, key_object, array, _ in ENTRIES:
        key = store.publish(kind, key_object, array, {})
        kvstore = {"driver": "file", "path": str(store.path / kind / key)}
        opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        np.testing.assert_array_equal(opened.read().result(), array, strict=True)


def test_other_memory_layouts_are_stored_as_the_same_bytes(store):
    wanted = store.read("latents", store.publish("latents", {"layout": "plain"}, LATENTS, {}))
    turned = np.asfortranarray(LATENTS).astype(">f2")
    entry = store.read("latents", store.publish("latents", {"layout": "turned"}, turned, {}))
    np.testing.assert_array_equal(entry.array, LATENTS, strict=True)
    assert entry.attributes["sha256"] == wanted.attributes["sha256"]


def test_a_second_publish_changes_nothing(store):
    key = store.publish("latents", {"x": 1}, LATENTS, {"by": "first"})
    assert store.publish("latents", {"x": 1}, LATENTS + 1, {"by": "second"}) == key
    entry = store.read("latents", key)
    np.testing.assert_array_equal(entry.array, LATENTS)
    assert entry.attributes["made"] == {"by": "first"}
    assert _files(store.path / "tmp") == ["zarr.json"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_that_are_not_finite_are_refused(store, bad, dtype):
    array = np.zeros((3, 4), np.float32 if dtype == "bfloat16" else dtype)
    array[1, 2] = bad
    if dtype == "bfloat16":
        array = (array.view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(InputError, match="1 of 12 values are not finite"):
        store.publish("text", {"dtype": dtype}, array, {})
    assert store.keys("text") == set()


@pytest.mark.parametrize(
    ("kind", "key_object", "array"),
    [
        ("text", {}, np.zeros((2, 3), np.uint16)),
        ("text", {"dtype": "float32"}, np.zeros((2, 3), np.uint16)),
        ("text", {"dtype": "bfloat16"}, np.zeros((2, 3), np.float32)),
        ("text", {"dtype": "float16"}, np.zeros((2, 3), np.float32)),
        ("text", {}, np.zeros((2, 3), np.float64)),
        ("text", {}, np.zeros((2, 3), np.int32)),
        ("text", {}, np.zeros((2, 3, 4), np.float32)),
        ("text", {}, np.zeros((0, 3), np.float32)),
        ("latents", {}, np.zeros((2, 3), np.float32)),
        ("text", {"kind": "latents"}, np.zeros((2, 3), np.float32)),
        ("pictures", {}, np.zeros((2, 3), np.float32)),
        ("sets", {}, np.zeros((2, 3), np.float32)),
    ],
)
def test_what_does_not_belong_is_refused(store, kind, key_object, array):
    before = _files(store.path)
    with pytest.raises(InputError):
        store.publish(kind, key_object, array, {})
    assert _files(store.path) == before


def test_made_must_be_plain_json(store):
    for made in ({"x": float("nan")}, {"x": np.float32(1)}):
        with pytest.raises((ValueError, TypeError)):
            store.publish("masks", {}, MASK, made)
    assert store.keys("masks") == set()


def test_remove(store):
    key = store.publish("masks", {}, MASK, {})
    store.remove("masks", key)
    assert not store.has("masks", key)
    assert _files(store.path / "tmp") == ["zarr.json"]
    with pytest.raises(StoreError, match=f"masks/{key} is missing"):
        store.remove("masks", key)


def test_reading_what_is_not_there_looks_again_and_then_says_so(tmp_path):
    waits = []
    store = cache.open(tmp_path / "s", "a", wait=waits.append)
    with pytest.raises(StoreError, match=f"text/{'0' * 64} is missing. Run `relay encode`"):
        store.read("text", "0" * 64)
    assert waits == [1.0]


def test_an_entry_that_gc_puts_back_is_read_on_the_second_look(tmp_path):
    store = cache.open(tmp_path / "s", "a")
    key = store.publish("masks", {}, MASK, {})
    aside = store.set_aside("masks", key)
    assert aside is not None
    reader = cache.open(store.path, wait=lambda seconds: store.put_back(aside, "masks", key))
    np.testing.assert_array_equal(reader.read("masks", key).array, MASK)


@pytest.mark.parametrize("key", ["", "../../x", "A" * 64, "0" * 63])
def test_what_is_not_a_key_is_refused(store, key):
    with pytest.raises(StoreError, match="is not a key"):
        store.read("text", key)


def test_resolve_wants_one_answer(store):
    keys = [store.publish("masks", {"i": i}, MASK, {}) for i in range(20)]
    assert store.resolve(keys[0][:20]) == ("masks", keys[0])
    assert store.resolve(keys[0].upper()) == ("masks", keys[0])
    with pytest.raises(StoreError, match="20 keys begin with ''"):
        store.resolve("")
    with pytest.raises(StoreError, match="has nothing in text whose key"):
        store.resolve(keys[0], kinds=("text",))


def test_reading_creates_nothing(tmp_path):
    missing = tmp_path / "missing.zarr"
    with pytest.raises(StoreError, match="does not exist"):
        cache.open(missing)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_may_not_write(store):
    reader = cache.open(store.path)
    for call in (
        lambda: reader.publish("masks", {}, MASK, {}),
        lambda: reader.remove("masks", "0" * 64),
        lambda: reader.publish_set({}, {}),
    ):
        with pytest.raises(StoreError, match="opened for reading only"):
            call()


def _foreign(path, what):
    if what == "a file":
        path.write_text("x")
    elif what == "a folder":
        path.mkdir()
        (path / "photo.png").write_bytes(b"x")
    elif what == "another Zarr":
        zarr.create_group(path, attributes={"format": "x"}, zarr_format=3)
    elif what == "an array":
        zarr.create_array(path, shape=(2,), dtype="f4", zarr_format=3)
    elif what == "Zarr 2":
        zarr.create_group(path, zarr_format=2)
    elif what == "broken":
        path.mkdir()
        (path / "zarr.json").write_text("{")


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a file", "is a file"),
        ("a folder", "is not a store: it is a folder without zarr.json"),
        ("another Zarr", "not a store of this program"),
        ("an array", "not a store of this program"),
        ("Zarr 2", "Zarr of format 2"),
        ("broken", "not JSON"),
    ],
)
def test_what_is_not_a_store_is_refused_and_left_alone(tmp_path, mode, what, message):
    _foreign(tmp_path / "x", what)
    before = _files(tmp_path)
    with pytest.raises(StoreError, match=message):
        cache.open(tmp_path / "x", mode)
    assert _files(tmp_path) == before


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("version", [2, 0, "1", True, None])
def test_another_version_is_refused_naming_both(store, mode, version):
    path = store.path / "zarr.json"
    root = json.loads(path.read_bytes())
    root["attributes"]["version"] = version
    path.write_text(json.dumps(root))
    with pytest.raises(StoreError, match=f"of version {version}; this program reads version 1"):
        cache.open(store.path, mode)


def test_an_unknown_attribute_is_ignored(store):
    key = store.publish("masks", {}, MASK, {})
    for path in (store.path / "zarr.json", store.path / "masks" / key / "zarr.json"):
        metadata = json.loads(path.read_bytes())
        metadata["attributes"]["future"] = 1
        path.write_text(json.dumps(metadata))
    np.testing.assert_array_equal(cache.open(store.path).read("masks", key).array, MASK)


def test_a_folder_that_cannot_become_a_store_is_told_what_can(tmp_path, monkeypatch):
    """A disk that is mounted there, or a folder that is ours in one that is not."""

    def busy(*arguments):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(durable.os, "rename", busy)
    with pytest.raises(StoreError, match=r"resource busy\. It is made beside its place: name a folder in it, .*zarr"):
        cache.open(tmp_path, "a")
    with pytest.raises(StoreError, match=r"cannot be created: Device or resource busy\.$"):
        cache.open(tmp_path / "new", "a")
    assert list(tmp_path.iterdir()) == []


def test_appending_accepts_an_empty_folder_and_completes_a_partial_copy(tmp_path):
    (tmp_path / "s").mkdir()
    store = cache.open(tmp_path / "s", "a")
    for name in (*KINDS, "sets", "tmp"):
        (store.path / name / "zarr.json").unlink()
        (store.path / name).rmdir()
    with pytest.raises(StoreError, match="text cannot be listed"):
        store.keys("text")
    store = cache.open(tmp_path / "s", "a")
    assert store.publish("masks", {}, MASK, {}) in store.keys("masks")
    assert store.keys("text") == set()


def test_a_link_to_a_store_is_that_store(store, tmp_path):
    key = store.publish("masks", {}, MASK, {})
    (tmp_path / "link").symlink_to(store.path)
    assert cache.open(tmp_path / "link", "a").keys("masks") == {key}


def test_urls_and_unknown_arguments_are_refused(tmp_path):
    with pytest.raises(StoreError, match="after one of s3://, gs://, az://"):
        cache.open("ftp://host/store.zarr")
    with pytest.raises(ValueError, match="codec 'lz4'"):
        cache.open(tmp_path / "s", "a", codec="lz4")
    with pytest.raises(ValueError, match="mode 'w'"):
        cache.open(tmp_path / "s", "w")  # pyright: ignore[reportArgumentType]


def test_the_room_is_light_to_import():
    import subprocess

    code = "import sys, flux2_relay.cache.audit, flux2_relay.cache.explain, flux2_relay.cache.writer; "
    code += "print([name for name in ('zarr', 'mlx', 'PIL') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
