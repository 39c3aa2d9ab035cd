"""A store that is looked at, copied or published into while `gc` or a repair is in it; and links in a store."""

import json
import os
import time

import numpy as np
import pytest
from tiny.project import relay

from flux2_relay import cache
from flux2_relay.cache import durable, nodes, transfer
from flux2_relay.cache.audit import gc, stats, sweep, verify
from flux2_relay.cache.errors import StoreError

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def store(tmp_path):
    return cache.open(tmp_path / "store.zarr", "a", wait=lambda seconds: None)


def _publish(store, *numbers):
    return [store.publish("text", {"kind": "text", "i": i}, ARRAY + i, {}) for i in numbers]


def _at_first(monkeypatch, what, name, act):
    """Do something just before a function is called for the first time."""
    real = getattr(what, name)

    def first(*arguments, **named):
        monkeypatch.setattr(what, name, real)
        act(*arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(what, name, first)


def test_a_set_that_is_dropped_while_a_store_is_verified_is_no_error(store, monkeypatch):
    _publish(store, 1)
    key = store.publish_set({"name": "a", "samples": []}, {"at": "1"})
    _at_first(monkeypatch, cache.Store, "read_set", lambda self, name: self.remove("sets", name))
    found = verify(store)
    assert (found.faults, found.missing, found.checked) == ((), {}, 2)
    assert key not in store.set_keys()


def test_what_is_collected_while_it_is_counted_is_not_damaged(store, monkeypatch):
    kept, gone = sorted(_publish(store, 1, 2))
    monkeypatch.setattr("flux2_relay.cache.audit._names", lambda store, kind: [kept, gone] if kind == "text" else [])
    store.remove("text", gone)
    found = stats(store)
    assert (found.kinds["text"].entries, found.damaged) == (1, 0)


def test_what_is_collected_while_it_is_listed_is_not_damaged(store, monkeypatch):
    kept, gone = sorted(_publish(store, 1, 2))
    real = cache.Store.header

    def header(self, kind, key):
        if key == gone and self.has(kind, key):
            self.remove(kind, key)
        return real(self, kind, key)

    monkeypatch.setattr(cache.Store, "header", header)
    outcome = relay("cache", "ls", "--json", "--store", store.path)
    assert [(entry["key"], entry["dtype"]) for entry in json.loads(outcome.said)["entries"]] == [(kept, "float32")]
    with pytest.raises(StoreError, match=f"{gone} is missing"):
        store.header("text", gone)


def test_what_is_collected_while_a_store_is_pushed_is_not_damaged(store, tmp_path, monkeypatch):
    kept, gone = _publish(store, 1, 2)
    target = cache.open(tmp_path / "other.zarr", "a")
    _at_first(monkeypatch, transfer, "_copy_all", lambda source, *rest: source.remove("text", gone))
    found = transfer.copy(store, target)
    assert (found.entries, found.faults) == (1, ())
    assert target.keys("text") == {kept}


def test_what_gc_puts_back_while_a_store_is_pushed_is_pushed(tmp_path):
    held = []
    store = cache.open(tmp_path / "store.zarr", "a", wait=lambda seconds: store.put_back(*held.pop()))
    (key,) = _publish(store, 1)
    target = cache.open(tmp_path / "other.zarr", "a")
    real = cache.Store.keys

    def keys(self, kind):
        found = real(self, kind)
        if self is store and kind == "text":
            held.append((self.set_aside(kind, key), kind, key))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.Store, "keys", keys)
        found = transfer.copy(store, target)
    assert (found.entries, found.faults) == (1, ())
    assert target.keys("text") == {key}


def test_a_set_published_anew_while_gc_has_it_out_of_sight_and_puts_it_back(store, monkeypatch):
    body = {"name": "a", "samples": []}
    key = store.publish_set(body, {"at": "1"})
    real = os.rename

    def rename(source, place):
        if os.fspath(place).endswith("zarr.json"):
            monkeypatch.setattr(durable.os, "rename", real)
            aside = store.set_aside("sets", key)
            try:
                return real(source, place)
            finally:
                store.put_back(aside, "sets", key)
        return real(source, place)

    monkeypatch.setattr(durable.os, "rename", rename)
    assert store.publish_set(body, {"at": "2"}) == key
    assert store.open_set(key).at == "2"
    assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"]


def test_what_is_taken_away_as_damaged_while_it_is_published_is_published(store, monkeypatch):
    """`has` saw it, and then a repair was quicker."""
    (key,) = _publish(store, 1)
    (store.path / "text" / key / "zarr.json").unlink()
    _at_first(monkeypatch, cache.Store, "examine", lambda self, *name: verify_elsewhere(store, key))
    assert _publish(store, 1) == [key]
    np.testing.assert_array_equal(store.read("text", key).array, ARRAY + 1)


def verify_elsewhere(store, key):
    assert [fault.key for fault in verify(store, repair=True).faults] == [key]


@pytest.mark.parametrize("kind", ["text", "sets"])
def test_a_link_to_nothing_is_damage_that_is_mended(store, tmp_path, kind):
    """Somebody moved an entry to another disk, which is not there now."""
    text = _publish(store, 1)[0]
    keys = {"text": text, "sets": store.publish_set({"name": "a", "samples": [{"text": [text]}]}, {"at": "1"})}
    place = store.path / kind / keys[kind]
    place.rename(tmp_path / "gone")
    place.symlink_to(tmp_path / "nowhere", target_is_directory=True)
    with pytest.raises(StoreError, match="is damaged: it is a link to nothing"):
        store.read("text", text) if kind == "text" else store.open_set(keys["sets"])
    assert [(fault.kind, fault.reason) for fault in verify(store).faults] == [(kind, "it is a link to nothing")]
    if kind == "text":
        assert _publish(store, 1) == [text]
    else:
        store.publish_set({"name": "a", "samples": [{"text": [text]}]}, {"at": "1"})
    assert verify(store).faults == ()
    assert (tmp_path / "gone").is_dir()
    assert not place.is_symlink()


def test_a_set_that_is_a_link_to_nothing_stops_gc_but_no_encoder(store, tmp_path):
    (key,) = _publish(store, 1)
    place = store.path / "sets" / store.publish_set({"name": "a", "samples": [{"text": [key]}]}, {"at": "1"})
    place.rename(tmp_path / "gone")
    place.symlink_to(tmp_path / "nowhere", target_is_directory=True)
    with pytest.raises(StoreError, match="is damaged: it is a link to nothing"):
        gc(store, now=time.time())
    assert store.keys("text") == {key}
    store.set_aside("text", *_publish(store, 2))
    assert sweep(store, now=time.time() + 2 * 24 * 3600) == 1
    assert store.time_for_set("2") == "2"


def test_a_linked_entry_is_one(store, tmp_path):
    (key,) = _publish(store, 1)
    place = store.path / "text" / key
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved", target_is_directory=True)
    np.testing.assert_array_equal(store.read("text", key).array, ARRAY + 1)
    assert verify(store, repair=True).faults == ()
    store.remove("text", key)
    assert (tmp_path / "moved" / "zarr.json").exists()
    assert nodes.Folder(store.path).exists("text", key) is False
