"""Unlucky moments: two processes meet between two calls, or one is killed there; nothing acknowledged is lost."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest

from flux2_relay import cache
from flux2_relay.cache import durable, nodes, transfer
from flux2_relay.cache.audit import gc, mend, sweep, verify
from flux2_relay.cache.errors import RelayError
from flux2_relay.cache.keys import key_of

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)
TWO_DAYS = 2 * 24 * 3600.0


@pytest.fixture
def store(tmp_path):
    return cache.open(tmp_path / "store.zarr", "a", wait=lambda seconds: None)


def _name(store, *keys, name="set", at="2026-01-01"):
    return store.publish_set({"name": name, "samples": [{"text": list(keys)}]}, {"at": at})


def _in_tmp(store):
    return [path.name for path in (store.path / "tmp").iterdir() if path.name != "zarr.json"]


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_verifying_beside_gc_spares_what_gc_puts_back(store, monkeypatch, full, repair):
    key = store.publish("text", {"i": 1}, ARRAY, {})
    _name(store, key)
    real, seen = nodes.Folder.read, []

    def read(self, kind, name, files):
        if kind == "sets" or seen:
            return real(self, kind, name, files)
        seen.append(name)
        aside = self.set_aside(kind, name)
        try:
            return real(self, kind, name, files)
        finally:
            self.put_back(aside, kind, name)

    monkeypatch.setattr(nodes.Folder, "read", read)
    found = verify(store, full=full, repair=repair)
    assert seen == [key]
    assert (found.faults, found.missing) == ((), {})
    np.testing.assert_array_equal(store.read("text", key).array, ARRAY)


def test_what_looked_damaged_and_is_not_stays(store):
    key = store.publish("text", {"i": 1}, ARRAY, {})
    assert not store.withdraw("text", key)
    assert store.keys("text") == {key}
    (store.path / "text" / key / "c.0.0").write_bytes(b"x")
    assert store.withdraw("text", key)
    assert store.withdraw("text", key)  # somebody else was quicker
    assert store.keys("text") == set()


def test_an_entry_is_read_whole_while_another_takes_its_place(store, monkeypatch):
    """Both are whole, but neither chunk fits the other's zarr.json."""
    short, long = np.ones((2, 3), np.float32), np.arange(600, dtype=np.float32).reshape(20, 30)
    key = store.publish("text", {"i": 1}, short, {})
    real, calls = nodes._read_in, []

    def read_in(folder, name):
        data = real(folder, name)
        calls.append(name)
        if len(calls) == 1:
            aside = store.set_aside("text", key)
            store.publish("text", {"i": 1}, long, {})
            aside.rename(store.path / "tmp" / "elsewhere")
        return data

    monkeypatch.setattr(nodes, "_read_in", read_in)
    np.testing.assert_array_equal(store.read("text", key).array, short)
    np.testing.assert_array_equal(store.read("text", key).array, long)


def test_a_writer_that_wakes_up_while_its_folder_is_swept_publishes_nothing_torn(store, monkeypatch):
    """It slept for more than a day, or its clock is a day behind."""
    real_rename, real_remove = os.rename, shutil.rmtree

    def rename(source, place):
        monkeypatch.setattr(durable.os, "rename", real_rename)
        monkeypatch.setattr(durable.shutil, "rmtree", lambda path, **_: remove(path, source, place))
        assert sweep(store, now=time.time() + TWO_DAYS) == 1
        if source.exists():
            real_rename(source, place)
        else:
            raise FileNotFoundError(2, os.strerror(2), str(source))

    def remove(path, source, place):
        (path / "c.0.0").unlink()
        if source.exists():
            real_rename(source, place)  # the writer's turn
        real_remove(path, ignore_errors=True)

    monkeypatch.setattr(durable.os, "rename", rename)
    with pytest.raises(RelayError, match="No such file"):
        store.publish("text", {"i": 1}, ARRAY, {})
    monkeypatch.undo()
    assert verify(store).faults == ()
    assert store.keys("text") == set()
    assert _in_tmp(store) == []


def test_what_a_killed_gc_held_is_put_back(store):
    held = [store.publish("text", {"i": i}, ARRAY, {}) for i in range(4)]
    needed, _, damaged, anew = held
    for key in held:
        assert store.set_aside("text", key) is not None  # and then it was killed
    (aside,) = (store.path / "tmp").glob(f"text.{damaged}.*")
    (aside / "c.0.0").write_bytes(b"x")
    _name(store, needed, damaged, anew)
    store.publish("text", {"i": 3}, ARRAY, {"by": "another"})
    assert sweep(store, now=time.time()) == 0  # it may be alive
    assert sweep(store, now=time.time() + TWO_DAYS, dry_run=True) == 4
    assert store.keys("text") == {anew}
    assert sweep(store, now=time.time() + TWO_DAYS) == 4
    assert store.keys("text") == {needed, anew}
    assert store.read("text", anew).attributes["made"] == {"by": "another"}
    assert verify(store).faults == ()
    assert _in_tmp(store) == []


def test_a_set_that_is_published_anew_while_gc_drops_it_stays(store, monkeypatch):
    key = store.publish("text", {"i": 1}, ARRAY, {})
    old = _name(store, key, at="2026-01-01")
    store.publish_set({"name": "set", "samples": []}, {"at": "2026-01-02"})
    real = cache.Store.set_aside

    def set_aside(self, kind, name):
        if kind == "sets":
            assert _name(store, key, at="2026-01-03") == old
        return real(self, kind, name)

    monkeypatch.setattr(cache.Store, "set_aside", set_aside)
    found = gc(store, now=time.time(), keep=1)
    assert (found.sets, found.entries["text"]) == ((), ())
    assert store.open_set(old).at == "2026-01-03"
    assert store.keys("text") == {key}


def test_a_set_out_of_sight_still_pins(store):
    """Another `gc` is about to put it back; or it was damaged, and the next `encode` makes it anew."""
    first, second = (store.publish("text", {"i": i}, ARRAY, {}) for i in range(2))
    aside = store.set_aside("sets", _name(store, first, name="hidden"))
    damaged = _name(store, second, name="damaged")
    path = store.path / "sets" / damaged / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"damaged"', b'"damages"'))
    assert [fault.repaired for fault in verify(store, repair=True).faults] == [True]
    gc(store, now=time.time())
    assert store.keys("text") == {first, second}
    store.put_back(aside, "sets", aside.name.split(".")[1])
    gc(store, now=time.time() + TWO_DAYS)  # the damaged one is swept up
    gc(store, now=time.time())
    assert store.keys("text") == {first}


def test_a_set_that_gc_puts_back_is_found_on_the_second_look(tmp_path, store):
    key = _name(store)
    aside = store.set_aside("sets", key)
    reader = cache.open(store.path, wait=lambda seconds: store.put_back(aside, "sets", key))
    assert reader.open_set(key).key == key


@pytest.mark.parametrize("damage", ["empty", "cut short", "no zarr.json"])
def test_publishing_over_damage_mends_it(store, damage):
    key = store.publish("text", {"i": 1}, ARRAY, {"by": "first"})
    folder = store.path / "text" / key
    if damage == "cut short":
        (folder / "c.0.0").write_bytes((folder / "c.0.0").read_bytes()[:-1])
    else:
        (folder / "zarr.json").unlink()
        if damage == "empty":
            (folder / "c.0.0").unlink()
    assert store.publish("text", {"i": 1}, ARRAY, {"by": "second"}) == key
    assert store.read("text", key).attributes["made"] == {"by": "second"}
    assert verify(store).faults == ()


def test_what_an_interrupted_copy_left_is_mended(store, tmp_path):
    keys = [store.publish("text", {"i": i}, ARRAY, {}) for i in range(3)]
    copy = cache.open(shutil.copytree(store.path, tmp_path / "copy.zarr"), "a")
    (copy.path / "text" / keys[1] / "zarr.json").unlink()
    assert [fault.key for fault in mend(copy, {"text": [*keys, key_of({"i": 9})]})] == [keys[1]]
    assert copy.keys("text") == {keys[0], keys[2]}
    assert mend(copy, {"text": keys}) == []


def test_a_set_asked_for_again_is_the_newest_over_there_too(store, tmp_path):
    other = cache.open(tmp_path / "other.zarr", "a")
    for name, at in (("first", "2026-01-01"), ("second", "2026-01-02"), ("first", "2026-01-03")):
        _name(store, name=name, at=at)
        transfer.copy(store, other)
        assert other.sets()[0].name == name
    _name(other, name="second", at="2026-01-04")
    assert transfer.copy(store, other).sets == 0  # what is older here changes nothing there
    assert [record.name for record in other.sets()] == ["second", "first"]


def test_two_that_complete_a_partial_copy_do_not_mind_each_other(store, monkeypatch):
    path = store.path / "text" / "zarr.json"
    expected = path.read_bytes()
    path.unlink()
    real = durable.replace_file

    def replace(data, tmp, place):
        monkeypatch.setattr(durable, "replace_file", real)
        cache.open(store.path, "a")
        return real(data, tmp, place)

    monkeypatch.setattr(durable, "replace_file", replace)
    cache.open(store.path, "a")
    assert json.loads(path.read_bytes()) == json.loads(expected)
    assert {path.name for path in store.path.iterdir()} == {*nodes.GROUPS, "zarr.json"}


def test_a_clock_that_is_behind_publishes_the_newest_set_all_the_same(store):
    assert store.time_for_set("1970-01-01T00:00:07+00:00") == "1970-01-01T00:00:07+00:00"
    _name(store, name="of another machine", at="2026-11-24T17:00:00+00:00")
    assert store.time_for_set("2026-11-24T17:00:00.5+00:00") == "2026-11-24T17:00:00.5+00:00"
    at = store.time_for_set("1970-01-01T00:00:07+00:00")
    _name(store, name="of ours", at=at)
    assert [record.name for record in store.sets()] == ["of ours", "of another machine"]
    assert at == "2026-11-24T17:00:00.000001+00:00"
    (store.path / "sets" / key_of({"damaged": True})).mkdir()
    _name(store, name="no time at all", at="never")
    assert store.time_for_set("1970-01-01T00:00:07+00:00") == "1970-01-01T00:00:07+00:00"


def test_names_suit_every_file_system(store):
    """Macs and Windows shares ignore case, rewrite accents and refuse some letters; many allow 143 bytes or more."""
    key = store.publish("text", {"caption": "ein süßer Fuchs / aux"}, ARRAY, {})
    store.publish("masks", {"kind": "masks"}, ARRAY, {})
    assert store.set_aside("text", key) is not None
    _name(store, key, name="Ä: aux")
    names = [path.name for path in store.path.rglob("*")]
    assert len(names) > 12
    assert all(re.fullmatch(r"[0-9a-z]+(\.[0-9a-z]+)*", name) and len(name) <= 143 for name in names)
