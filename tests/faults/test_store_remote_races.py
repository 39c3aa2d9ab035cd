"""Writers and collectors at one bucket, in every order of their requests: nothing is lost, nothing half there.

The bucket is obstore's own in memory, whose create-only is one step, as that of the clouds is.
"""

import json
import threading
import time

import numpy as np
import pytest

from flux2_relay.cache import encoding, nodes, remote
from flux2_relay.cache.audit import gc, verify
from flux2_relay.cache.errors import RelayError
from flux2_relay.cache.keys import key_of
from flux2_relay.cache.nodes import Folder
from flux2_relay.cache.store import Store

obstore = pytest.importorskip("obstore", reason="needs obstore, of the extra `remote`")

KEY = {"kind": "text", "dtype": "float32", "caption": "a fox"}
REQUESTS = ("get", "put", "delete", "head", "list")
LATER = 10 * 24 * 3600.0  # when the lone chunk is older than a day


@pytest.fixture(autouse=True)
def _without_fsync(monkeypatch):
    """The folders of copies are not what is tested here, and waiting for the disk is most of the time."""
    monkeypatch.setattr(nodes.durable, "_flush", lambda fd: None)
    monkeypatch.setattr(nodes.durable.os, "fsync", lambda fd: None)


def machines(tmp_path, count, wait=lambda seconds: None):
    """One bucket as several machines see it."""
    objects, found = obstore.store.MemoryStore(), []
    for name in range(count):
        copies = tmp_path / str(name)
        nodes.create_folder(copies)
        bucket = remote.Bucket("memory://bucket", objects)
        remote._open_root(bucket, "a")
        found.append(Store(remote.Remote(bucket, Folder(copies)), "a", wait=wait))
    return found


def array(who, i=0):
    """What machine `who` computes for entry `i`: the same but for the last bits."""
    return np.random.default_rng(i).standard_normal((3, 40)).astype(np.float32) + np.float32(who) * np.float32(2**-20)


def encode(store, who, entries=(KEY,), name="set"):
    """Publish the set, look, fill until nothing is missing -> the set."""
    body = {"name": name, "samples": [{"text": [key_of(entry) for entry in entries]}]}
    record = store.open_set(store.publish_set(body, {"at": "1"}))
    while missing := store.missing(record, patient=False):
        for i, entry in enumerate(entries):
            if key_of(entry) in missing["text"]:
                store.publish("text", entry, array(who, i), {"by": who})
    return record


def nothing(store):
    """The bucket at first: empty."""


def an_orphan(store):
    """The bucket at first: the entry, named by no set."""
    store.publish("text", KEY, array(7), {"by": 7})


def a_lone_chunk(store):
    """The bucket at first: what a writer left that died between its two objects."""
    store.nodes.bucket.create(f"text/{key_of(KEY)}/c.0.0", encoding.build("text", KEY, array(8), {}, "none")["c.0.0"])


class Turn:
    """Lets somebody else act, all at once, just before request number `at` of whoever acts first."""

    def __init__(self, monkeypatch, at, other):
        self.at, self.other, self.count, self.busy = at, other, 0, False
        for name in REQUESTS:
            monkeypatch.setattr(obstore, name, self._counted(getattr(obstore, name)))

    def _counted(self, real):
        def request(*arguments, **options):
            if not self.busy:
                if self.count == self.at:
                    self.busy = True
                    self.other()
                    self.busy = False
                self.count += 1
            return real(*arguments, **options)

        return request


def assert_whole(store):
    """The set's entry is there, and its zarr.json speaks of the chunk beside it."""
    key = key_of(KEY)
    assert store.keys("text") == {key}
    assert verify(store).faults == ()
    assert verify(store).missing == {}
    bucket = store.nodes.bucket
    told = json.loads(bucket.get(f"text/{key}/zarr.json"))["attributes"]["flux2_relay"]
    assert told["stored_bytes"] == bucket.size(f"text/{key}/c.0.0")


def in_every_order(tmp_path, first, other, begin):
    """Run `first`, with `other` before each of its requests in turn -> in how many orders."""
    at = 0
    while True:
        one, two, reader = machines(tmp_path / str(at), 3)
        begin(one)
        with pytest.MonkeyPatch.context() as patch:
            turn = Turn(patch, at, lambda two=two: other(two))
            first(one)
        if turn.count <= at:
            return at
        assert_whole(reader)
        at += 1


def collect(store):
    """Collect garbage, from a clock that makes every leftover an old one."""
    gc(store, now=time.time() + LATER)


@pytest.mark.parametrize("begin", [nothing, an_orphan, a_lone_chunk])
def test_gc_at_any_moment_of_an_encoder(tmp_path, begin):
    assert in_every_order(tmp_path, lambda store: encode(store, 1), collect, begin) >= 3


@pytest.mark.parametrize("begin", [nothing, an_orphan, a_lone_chunk])
def test_an_encoder_at_any_moment_of_gc(tmp_path, begin):
    assert in_every_order(tmp_path, collect, lambda store: encode(store, 2), begin) >= 4


@pytest.mark.parametrize("begin", [nothing, an_orphan, a_lone_chunk])
def test_gc_and_then_another_encoder_at_any_moment_of_an_encoder(tmp_path, begin):
    def other(store):
        collect(store)
        encode(store, 2)

    assert in_every_order(tmp_path, lambda store: encode(store, 1), other, begin) >= 3


@pytest.mark.parametrize("begin", [nothing, an_orphan, a_lone_chunk])
def test_an_encoder_and_another_gc_at_any_moment_of_gc(tmp_path, begin):
    def other(store):
        encode(store, 2)
        collect(store)

    assert in_every_order(tmp_path, collect, other, begin) >= 4


def test_a_zarr_json_that_speaks_of_a_deleted_chunk_is_put_right(tmp_path):
    """Three writers and a collector: the one who describes a chunk loses it before he has put his description."""
    slow, quick = machines(tmp_path, 2)
    a_lone_chunk(slow)
    place, bucket = f"text/{key_of(KEY)}", slow.nodes.bucket
    described = encoding.adopt("text", encoding.build("text", KEY, array(1), {}, "zstd"), bucket.get(f"{place}/c.0.0"))
    bucket.sweep("text", key_of(KEY))
    bucket.create(f"{place}/c.0.0", encoding.build("text", KEY, array(2), {}, "zstd")["c.0.0"])
    bucket.create(f"{place}/zarr.json", described["zarr.json"])
    assert verify(quick).faults != ()
    quick.nodes.publish("text", key_of(KEY), encoding.build("text", KEY, array(2), {}, "zstd"))
    assert verify(quick).faults == ()
    np.testing.assert_array_equal(slow.read("text", key_of(KEY)).array, array(2), strict=True)


def test_encoders_and_collectors_all_at_once(tmp_path):
    """Three machines encode overlapping sets, with bits of their own, while two others collect."""
    *encoders, one, two, reader = machines(tmp_path, 6, wait=lambda seconds: time.sleep(0.02))
    entries = [{**KEY, "i": i} for i in range(6)]
    failures, done = [], threading.Event()

    def work(store, who):
        dice = np.random.default_rng(who)
        for turn in range(15):
            chosen = [entries[i] for i in sorted(dice.choice(len(entries), 3, replace=False))]
            record = encode(store, who, chosen, name=f"{who} {turn}")
            if store.missing(record):
                failures.append(("missing", record.name))
            failures.extend(reason for kind, key in ((k, e) for k, es in (("text", chosen),) for e in map(key_of, es))
                            if (reason := store.examine(kind, key)) is not None)  # fmt: skip
            store.remove("sets", record.key)

    def sweep(store):
        while not done.is_set():
            collect(store)

    workers = [threading.Thread(target=work, args=(store, who)) for who, store in enumerate(encoders)]
    collectors = [threading.Thread(target=sweep, args=(store,)) for store in (one, two)]
    for thread in workers + collectors:
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    for thread in collectors:
        thread.join()
    assert failures == []
    assert verify(reader).faults == ()
    collect(reader)
    assert reader.keys("text") == set()
    left = [path for path, _ in reader.nodes.bucket.list("") if path.count("/") == 2]
    assert left == []


def test_endless_quarrel_is_an_error_and_no_loop(tmp_path, monkeypatch):
    (store,) = machines(tmp_path, 1)
    monkeypatch.setattr(remote.Bucket, "get", lambda self, path: (_ for _ in ()).throw(FileNotFoundError(2, "", path)))
    node = encoding.build("text", KEY, array(1), {}, "zstd")
    a_lone_chunk(store)
    with pytest.raises(RelayError, match="others keep writing and deleting it"):
        store.publish_node("text", key_of(KEY), node)
