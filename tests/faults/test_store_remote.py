"""A store in a bucket, on an emulator of S3 that the test starts on this machine."""

import errno
import json
import threading
import time
from contextlib import suppress
from typing import Literal

import numpy as np
import pytest
import zarr
from zarr.storage import ObjectStore

from flux2_relay import cache
from flux2_relay.cache import durable, encoding, remote, transfer
from flux2_relay.cache.audit import gc, stats, sweep, verify
from flux2_relay.cache.errors import RelayError, StoreError
from flux2_relay.cache.keys import key_of

obstore = pytest.importorskip("obstore", reason="needs obstore, of the extra `remote`")

RNG = np.random.default_rng(0)
KEY = {"kind": "text", "dtype": "bfloat16", "caption": "a fox"}
ARRAY = RNG.integers(0, 0x7000, (5, 40)).astype(np.uint16)
LATENTS = RNG.standard_normal((4, 6, 8)).astype(np.float16)


@pytest.fixture
def store(url):
    return cache.open(url, "a", wait=lambda seconds: None)


def _elsewhere(url, tmp_path, monkeypatch, name, mode: Literal["r", "a"] = "r"):
    """The same store as another machine sees it: without the copies of this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    return cache.open(url, mode, wait=lambda seconds: None)


def _objects(store):
    return {path: store.nodes.bucket.get(path) for path, _ in store.nodes.bucket.list("")}


def _fill(store):
    text, latents = store.publish("text", KEY, ARRAY, {"by": "test"}), store.publish("latents", {"i": 1}, LATENTS, {})
    body = {"name": "all", "samples": [{"text": [text], "latents": [{"key": latents}]}]}
    return text, latents, store.publish_set(body, {"at": "1"})


def test_what_one_machine_publishes_another_reads_through_a_copy(store, url, tmp_path, monkeypatch):
    text, latents, key = _fill(store)
    other = _elsewhere(url, tmp_path, monkeypatch, "other")
    assert (other.keys("text"), other.keys("latents"), other.set_keys()) == ({text}, {latents}, {key})
    assert other.missing(other.open_set(key[:8])) == {}
    assert not (other.path / "text" / text).exists()
    entry = other.read("text", text)
    np.testing.assert_array_equal(entry.array, ARRAY, strict=True)
    assert entry.attributes["made"] == {"by": "test"}
    for name in encoding.file_names("text"):
        assert (other.path / "text" / text / name).read_bytes() == store.nodes.bucket.get(f"text/{text}/{name}")
    monkeypatch.setattr(remote.Bucket, "get", lambda self, path: pytest.fail("read twice"))
    np.testing.assert_array_equal(other.read("text", text).array, ARRAY, strict=True)


def test_zarr_reads_the_bucket_as_one_hierarchy(store):
    text, latents, _ = _fill(store)
    objects = ObjectStore(store.nodes.bucket.objects, read_only=True)
    assert zarr.open_group(objects, mode="r").attrs["format"] == "flux2-relay-cache"
    for path, array in ((f"text/{text}", ARRAY), (f"latents/{latents}", LATENTS)):
        np.testing.assert_array_equal(zarr.open_array(objects, path=path, mode="r")[...], array, strict=True)


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_the_first_chunk_wins(store, url, tmp_path, monkeypatch, codec):
    """A writer dies, or is slow, between its two objects; another with bits of its own comes along."""
    key, theirs = key_of(KEY), ARRAY + 1
    node = encoding.build("text", KEY, theirs, {"by": "first"}, codec)
    store.nodes.bucket.create(f"text/{key}/c.0.0", node["c.0.0"])
    assert store.keys("text") == set()  # an entry exists when its zarr.json does
    with pytest.raises(StoreError, match="is missing"):
        store.read("text", key)

    assert store.publish("text", KEY, ARRAY, {"by": "second"}) == key
    other = _elsewhere(url, tmp_path, monkeypatch, "other")
    for reader in (store, other):
        np.testing.assert_array_equal(reader.read("text", key).array, theirs, strict=True)
        assert reader.read("text", key).attributes["made"] == {"by": "second"}
    assert verify(other).faults == ()
    before = _objects(store)
    store.nodes.publish("text", key, node)  # the first one wakes up again
    assert _objects(store) == before


def test_a_chunk_that_is_none_is_named(store):
    store.nodes.bucket.create(f"text/{key_of(KEY)}/c.0.0", b"x")
    with pytest.raises(StoreError, match=r"c\.0\.0 is not an entry's chunk .* Delete this object"):
        store.publish("text", KEY, ARRAY, {})
    assert store.keys("text") == set()


def test_writers_with_different_bits_leave_whole_entries(url, tmp_path, monkeypatch):
    stores = [_elsewhere(url, tmp_path, monkeypatch, f"machine{who}", "a") for who in range(3)]
    barrier = threading.Barrier(3)

    def write(who):
        barrier.wait()
        for i in range(6):
            stores[who].publish("text", {**KEY, "i": i}, ARRAY + who, {"who": who})

    threads = [threading.Thread(target=write, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = _elsewhere(url, tmp_path, monkeypatch, "reader")
    assert len(reader.keys("text")) == 6
    assert verify(reader).faults == ()
    for key in reader.keys("text"):
        arrays = [store.read("text", key).array for store in (reader, *stores)]
        assert all((array == arrays[0]).all() for array in arrays)


def test_push_and_pull_give_the_same_store(store, url, tmp_path, monkeypatch):
    home = cache.open(tmp_path / "home.zarr", "a")
    text, latents, key = _fill(home)
    found = transfer.copy(home, store)
    assert (found.entries, found.sets, found.present, found.faults) == (2, 1, 0, ())
    again = transfer.copy(home, store)
    assert (again.entries, again.sets, again.present, again.stored_bytes) == (0, 0, 2, 0)

    away = cache.open(tmp_path / "away.zarr", "a")
    told = []
    transfer.copy(_elsewhere(url, tmp_path, monkeypatch, "away"), away, lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (home.path, away.path)
    ]
    assert files[0] == files[1]
    assert {path for path in _objects(store) if path.count("/") == 2} == {
        f"text/{text}/c.0.0", f"text/{text}/zarr.json", f"latents/{latents}/c.0.0.0", f"latents/{latents}/zarr.json",
        f"sets/{key}/zarr.json",
    }  # fmt: skip


@pytest.mark.parametrize("done", range(7))
@pytest.mark.parametrize("to", ["bucket", "folder"])
def test_a_copy_that_is_cut_off_goes_on(store, tmp_path, monkeypatch, to, done):
    """Whatever it dies at, what is over there by then is whole, and the next one copies only the rest."""
    home = cache.open(tmp_path / "home.zarr", "a")
    text, latents, key = _fill(home)
    target = store if to == "bucket" else cache.open(tmp_path / "away.zarr", "a")
    monkeypatch.setattr(transfer, "_THREADS", 1)
    calls = []

    def dies(real):
        def call(*arguments, **named):
            calls.append(real)
            if len(calls) > done:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for what, name in ((durable, "write_and_sync"), (remote.Bucket, "create"), (remote.Bucket, "replace")):
            patch.setattr(what, name, dies(getattr(what, name)))
        with suppress(KeyboardInterrupt):
            transfer.copy(home, target)
    assert verify(target).faults == ()
    there = len(target.keys("text")) + len(target.keys("latents"))
    assert target.set_keys() == {key} or there == 0, "the set comes first: gc spares what it names"
    gc(target, now=time.time())
    found = transfer.copy(home, target)
    assert (found.present, found.entries, found.faults) == (there, 2 - there, ())
    assert (target.keys("text"), target.keys("latents"), target.set_keys()) == ({text}, {latents}, {key})
    assert verify(target).faults == ()


def test_what_is_damaged_does_not_travel(store, tmp_path):
    text, latents, _ = _fill(store)
    store.nodes.bucket.replace(f"text/{text}/c.0.0", b"rubbish")
    away = cache.open(tmp_path / "away.zarr", "a")
    found = transfer.copy(store, away)
    assert [(fault.kind, fault.key) for fault in found.faults] == [("text", text)]
    assert (away.keys("text"), away.keys("latents")) == (set(), {latents})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], "is not an entry's chunk"),
        (lambda data: data[:-1] + b"x", "did not arrive as it was sent"),
    ],
    ids=["shorter", "another byte"],
)
def test_what_arrives_otherwise_is_an_error(store, tmp_path, monkeypatch, spoil, message):
    home = cache.open(tmp_path / "home.zarr", "a")
    _fill(home)
    create = remote.Bucket.create

    def lossy(self, path, data):
        return create(self, path, spoil(data) if "/c.0" in path else data)

    monkeypatch.setattr(remote.Bucket, "create", lossy)
    with pytest.raises(RelayError, match=message):
        transfer.copy(home, store)


def test_damage_in_the_bucket_is_named_and_repaired(store, url, tmp_path, monkeypatch):
    text, latents, _ = _fill(store)
    store.nodes.bucket.replace(f"text/{text}/c.0.0", b"rubbish")
    store.nodes.bucket.delete(f"latents/{latents}/c.0.0.0")
    other = _elsewhere(url, tmp_path, monkeypatch, "other", "a")
    for kind, key in (("text", text), ("latents", latents)):
        with pytest.raises(StoreError, match=r"is damaged.*relay cache verify --repair"):
            other.read(kind, key)
    assert {fault.key for fault in verify(other).faults} == {text, latents}
    assert verify(other, repair=True).sound
    assert (other.keys("text"), other.keys("latents")) == (set(), set())
    other.publish("text", KEY, ARRAY, {})
    np.testing.assert_array_equal(other.read("text", text).array, ARRAY, strict=True)


def test_a_damaged_copy_is_fetched_again(store):
    text, _, _ = _fill(store)
    (store.path / "text" / text / "c.0.0").write_bytes(b"x")
    np.testing.assert_array_equal(store.read("text", text).array, ARRAY, strict=True)
    np.testing.assert_array_equal(cache.open(store.path).read("text", text).array, ARRAY, strict=True)


def test_a_full_disk_here_costs_only_the_copy(store, url, tmp_path, monkeypatch):
    text, _, _ = _fill(store)
    other = _elsewhere(url, tmp_path, monkeypatch, "other")

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(remote.durable, "publish_folder", refuse)
    np.testing.assert_array_equal(other.read("text", text).array, ARRAY, strict=True)


def test_gc_and_stats(store):
    text, latents, _ = _fill(store)
    orphan = store.publish("text", {**KEY, "i": 1}, ARRAY, {})
    found = stats(store)
    assert (found.kinds["text"].entries, found.orphans.entries) == (2, 1)
    lone = f"text/{key_of({**KEY, 'i': 2})}/c.0.0"
    store.nodes.bucket.create(lone, b"x")
    assert sweep(store, now=time.time() + 1e6) == 0  # it does not list the bucket
    collected = gc(store, now=time.time() + 1e6)
    assert (collected.entries["text"], collected.leftovers, collected.put_back) == ((orphan,), 1, 0)
    assert (store.keys("text"), store.keys("latents")) == ({text}, {latents})
    assert not [path for path in _objects(store) if orphan in path or path == lone]
    assert not (store.path / "text" / orphan).exists()


def test_gcs_second_look_puts_back_what_a_new_set_names(store, monkeypatch):
    key = store.publish("text", KEY, ARRAY, {"by": "test"})
    real = cache.Store.set_aside

    def set_aside(self, kind, name):
        aside = real(self, kind, name)
        store.publish_set({"name": "new", "samples": [{"text": [key]}]}, {})
        return aside

    monkeypatch.setattr(cache.Store, "set_aside", set_aside)
    assert gc(store, now=time.time()).put_back == 1
    np.testing.assert_array_equal(store.read("text", key).array, ARRAY, strict=True)
    assert list((store.path / "tmp").iterdir()) == [store.path / "tmp" / "zarr.json"]


def test_foreign_places_are_refused(url, store, monkeypatch):
    with pytest.raises(StoreError, match=r"gone\.zarr does not exist"):
        cache.open(url.replace("store.zarr", "gone.zarr"))
    with pytest.raises(StoreError, match="it holds other objects"):
        cache.open(url.removesuffix("/store.zarr"), "a")
    with pytest.raises(StoreError, match="cannot be reached or used"):
        cache.open("s3://no-such-bucket/store.zarr", "a")
    with pytest.raises(StoreError, match="after one of s3://, gs://, az://"):
        cache.open("ftp://host/store.zarr")
    root = json.loads(store.nodes.bucket.get("zarr.json"))
    root["attributes"]["version"] = 2
    store.nodes.bucket.replace("zarr.json", json.dumps(root).encode())
    with pytest.raises(StoreError, match="of version 2; this program reads version 1"):
        cache.open(url)


def test_a_bucket_that_cannot_create_only_is_refused(url, store, monkeypatch):
    """Some imitations of S3 overwrite, others say that they cannot."""
    real = obstore.put
    monkeypatch.setattr(obstore, "put", lambda objects, path, data, mode: real(objects, path, data, mode="overwrite"))
    with pytest.raises(StoreError, match=r"overwrites what it is told to create only .* Encode into a folder"):
        cache.open(url, "a")
    assert cache.open(url).keys("text") == set()

    def refuse(objects, path, data, mode):
        raise obstore.exceptions.GenericError("If-None-Match is not implemented\nat length")

    monkeypatch.setattr(obstore, "put", refuse)
    with pytest.raises(StoreError, match=r"cannot be reached or used: If-None-Match is not implemented\."):
        cache.open(url, "a")


def test_a_reader_may_not_write(url, store):
    with pytest.raises(StoreError, match="opened for reading only"):
        cache.open(url).publish("text", KEY, ARRAY, {})
