"""What gc deletes and spares, and what stats adds up."""

import os
import time

import numpy as np
import pytest

from flux2_relay import cache
from flux2_relay.cache.audit import gc, stats, sweep
from flux2_relay.cache.errors import StoreError

NOW = time.time()
ARRAY = np.ones((2, 3), np.float32)


@pytest.fixture
def store(tmp_path):
    return cache.open(tmp_path / "s", "a", wait=lambda seconds: None)


def _text(store, i):
    return store.publish("text", {"i": i}, ARRAY, {})


def _set(store, name, text, at="1", **more):
    return store.publish_set({"name": name, "samples": [{"text": text}], **more}, {"at": at})


def test_gc_deletes_what_no_set_mentions(store):
    keys = [_text(store, i) for i in range(3)]
    mask = store.publish("masks", {"kind": "masks"}, ARRAY, {})
    kept = store.publish("latents", {}, ARRAY[None], {})
    _set(store, "a", keys[:1], somewhere_else={"deep": [kept]})
    size = sum(f.stat().st_size for key in keys[1:] for f in (store.path / "text" / key).iterdir())
    size += sum(f.stat().st_size for f in (store.path / "masks" / mask).iterdir())

    told = []
    dry = gc(store, now=NOW, dry_run=True)
    assert store.keys("text") == set(keys)
    found = gc(store, now=NOW, progress=lambda done, total: told.append((done, total)))
    assert found == dry
    assert found.entries == {"text": tuple(sorted(keys[1:])), "latents": (), "masks": (mask,)}
    assert (found.stored_bytes, found.put_back, found.sets) == (size, 0, ())
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (store.keys("text"), store.keys("latents"), store.keys("masks")) == ({keys[0]}, {kept}, set())
    assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 1}, {"a3", "b1"}),
        ({"keep": 0}, set()),
        ({"keep": 2}, {"a2", "a3", "b1"}),
        ({"drop": ["a"]}, {"b1"}),
        ({"drop": ["a"], "keep": 0}, set()),
        ({}, {"a1", "a2", "a3", "b1"}),
    ],
)
def test_sets_go_only_when_asked_for(store, options, left):
    keys = {name: _text(store, i) for i, name in enumerate(("a1", "a2", "a3", "b1"))}
    sets = {name: _set(store, name[0], [key], at=name[1]) for name, key in keys.items()}
    dry = gc(store, now=NOW, dry_run=True, **options)
    assert store.set_keys() == set(sets.values())
    found = gc(store, now=NOW, **options)
    assert dry == found
    assert {record.key for record in found.sets} == {key for name, key in sets.items() if name not in left}
    assert store.set_keys() == {sets[name] for name in left}
    assert store.keys("text") == {keys[name] for name in left}


def test_a_set_may_be_dropped_by_the_beginning_of_its_key(store):
    key = _set(store, "a", [])
    _set(store, "b", [])
    assert [record.key for record in gc(store, now=NOW, drop=[key[:12]]).sets] == [key]
    with pytest.raises(StoreError, match=r"no set is called 'c'.*Sets here: b\."):
        gc(store, now=NOW, drop=["c"])


def test_gc_refuses_to_guess_what_a_damaged_set_pins(store):
    key = _text(store, 1)
    name = _set(store, "a", [key])
    (store.path / "sets" / name / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match="is damaged"):
        gc(store, now=NOW)
    assert store.keys("text") == {key}


def test_gc_puts_back_what_it_holds_when_interrupted(store, monkeypatch):
    key = _text(store, 1)
    looks = []

    def look(self):
        looks.append(self)
        if len(looks) > 3:  # the first three list the garbage of each kind
            raise KeyboardInterrupt
        return set()

    monkeypatch.setattr("flux2_relay.cache.audit._Pins.look", look)
    with pytest.raises(KeyboardInterrupt):
        gc(store, now=NOW)
    assert store.keys("text") == {key}
    assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"]


def test_only_old_leftovers_are_swept(store):
    for name in ("old", "new"):
        (store.path / "tmp" / name).mkdir()
        (store.path / "tmp" / name / "c.0.0").write_bytes(b"x")
    (store.path / "tmp" / "file").write_bytes(b"x")
    day = 24 * 3600
    assert sweep(store, now=time.time() + day - 60) == 0
    later = time.time() + day + 1
    assert sweep(store, now=later, dry_run=True) == 3
    assert len(list((store.path / "tmp").iterdir())) == 4
    assert sweep(store, now=later) == 3
    assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"]


def test_an_old_entry_taken_out_of_sight_is_a_young_leftover(store):
    key = _text(store, 1)
    os.utime(store.path / "text" / key, (1, 1))
    aside = store.set_aside("text", key)
    assert aside.stat().st_mtime > 1
    assert sweep(store, now=time.time() + 60) == 0


def test_stats_add_up(store):
    keys = [_text(store, i) for i in range(4)]
    broken = _text(store, 4)
    latents = store.publish("latents", {"dtype": "bfloat16"}, np.ones((1, 2, 3), np.uint16), {})
    a = store.publish_set({"name": "a", "samples": [{"text": keys[:2], "latents": [{"key": latents}]}]}, {})
    b = _set(store, "b", keys[1:3])
    (store.path / "text" / broken / "zarr.json").write_text("{")
    (store.path / "tmp" / "x").mkdir()
    found = stats(store)
    assert (found.kinds["text"].entries, found.kinds["text"].raw_bytes) == (4, 4 * ARRAY.nbytes)
    assert (found.kinds["latents"].entries, found.kinds["latents"].raw_bytes) == (1, 12)
    assert found.kinds["latents"].stored_bytes == (store.path / "latents" / latents / "c.0.0.0").stat().st_size
    assert (found.sets[a].entries, found.sets[b].entries) == (3, 2)
    assert (found.own[a].entries, found.own[b].entries) == (2, 1)
    assert (found.shared.entries, found.orphans.entries) == (1, 1)
    assert (found.damaged, found.leftovers) == (1, 1)
