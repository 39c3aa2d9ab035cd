"""Several processes on one store: killed, racing each other, and racing the garbage collector."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flux2_relay import cache
from flux2_relay.cache.audit import gc, verify
from flux2_relay.cache.keys import key_of

WORKER = """
import sys
import numpy as np
from flux2_relay import cache

path, who, count, shape = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), (40, int(sys.argv[4]))
sys.stdin.readline()
store = cache.open(path, "a")
store.publish_set({"name": "all"}, {"at": str(who)})
for i in range(count):
    key = {"kind": "text", "dtype": "float32", "i": i}
    if who or not store.has("text", cache.store.key_of(key)):
        array = np.random.default_rng(i).standard_normal(shape).astype(np.float32) + who
        print(store.publish("text", key, array, {"who": who}), flush=True)
"""


def _start(path, who=0, count=1, channels=2000):
    command = [sys.executable, "-c", WORKER, str(path), str(who), str(count), str(channels)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def _output(process):
    assert process.stdout is not None
    return process.stdout


def _array(i, who=0, channels=2000):
    return np.random.default_rng(i).standard_normal((40, channels)).astype(np.float32) + np.float32(who)


def test_killed_at_any_moment_every_acknowledged_entry_is_whole(tmp_path):
    path = tmp_path / "store.zarr"
    acknowledged = set()
    for after, pause in ((1, 0.0), (6, 0.003), (9, 0.007)):
        with _start(path, count=100_000) as process:
            _go(process)
            lines = [_output(process).readline() for _ in range(after)]
            time.sleep(pause)
            process.kill()
            lines += _output(process).readlines()
        assert process.returncode == -9
        acknowledged |= {line.strip() for line in lines if line.endswith("\n")}
        store = cache.open(path)
        assert acknowledged <= store.keys("text")
        assert verify(store).faults == ()
    count = len(store.keys("text")) + 10
    with _start(path, count=count) as process:
        process.communicate("\n")
    assert verify(store).faults == ()
    assert len(store.keys("text")) == count
    for i in range(count):
        key = key_of({"kind": "text", "dtype": "float32", "i": i})
        np.testing.assert_array_equal(store.read("text", key).array, _array(i), strict=True)


def test_two_processes_make_one_store_and_write_the_same_keys(tmp_path):
    path = tmp_path / "new" / "store.zarr"
    processes = [_start(path, who, count=25, channels=50) for who in (1, 2)]
    for process in processes:
        _go(process)
    printed = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    store = cache.open(path)
    assert printed[0] == printed[1]
    assert store.keys("text") == set(printed[0])
    assert len(store.keys("text")) == 25
    assert verify(store).faults == ()
    for i, key in enumerate(printed[0]):
        entry = store.read("text", key)
        np.testing.assert_array_equal(entry.array, _array(i, entry.attributes["made"]["who"], 50), strict=True)
    assert [file.name for file in (store.path / "tmp").iterdir()] == ["zarr.json"]
    assert [file.name for file in path.parent.iterdir()] == ["store.zarr"]


def test_two_writers_with_different_keys_lose_nothing(tmp_path):
    store = cache.open(tmp_path / "s", "a")
    array = np.ones((2, 3), np.float32)
    keys = [set(), set()]

    def write(who):
        for i in range(30):
            keys[who].add(store.publish("text", {"who": who, "i": i}, array, {}))

    threads = [threading.Thread(target=write, args=(who,)) for who in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.keys("text") == keys[0] | keys[1]
    assert len(store.keys("text")) == 60


def _encode(store, entries, name, rounds, failures):
    """What encoding does: publish the set, look, fill until nothing is missing; then it must be complete."""
    array = np.ones((2, 3), np.float32)
    rng = np.random.default_rng(name)
    for turn in range(rounds):
        chosen = [entries[i] for i in rng.choice(len(entries), 4, replace=False)]
        body = {"name": f"{name}", "turn": turn, "samples": [{"text": [key_of(e) for e in chosen]}]}
        record = store.open_set(store.publish_set(body, {"at": f"{turn:06}"}))
        while missing := store.missing(record, patient=False):
            for entry in chosen:
                if key_of(entry) in missing["text"]:
                    store.publish("text", entry, array, {})
        time.sleep(0.002)
        if store.missing(record):
            failures.append(record)
        store.remove("sets", record.key)


def test_gc_against_encoders_never_leaves_a_set_incomplete(tmp_path):
    store = cache.open(tmp_path / "s", "a", wait=lambda seconds: time.sleep(0.05))
    entries = [{"i": i} for i in range(8)]
    failures, collected = [], []
    threads = [threading.Thread(target=_encode, args=(store, entries, name, 25, failures)) for name in (1, 2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        collected.append(gc(store, now=time.time()))
    assert failures == []
    assert sum(len(found.entries["text"]) for found in collected) > 0
    gc(store, now=time.time())
    assert store.keys("text") == set()
    assert [file.name for file in (store.path / "tmp").iterdir()] == ["zarr.json"]


@pytest.mark.parametrize("again", [False, True], ids=["absent meanwhile", "published anew"])
def test_gcs_second_look_puts_back_what_a_new_set_names(tmp_path, monkeypatch, again):
    store = cache.open(tmp_path / "s", "a", wait=lambda seconds: None)
    array = np.ones((2, 3), np.float32)
    key = store.publish("text", {"i": 1}, array, {"by": "first"})
    real = cache.Store.set_aside

    def set_aside(self, kind, name):
        aside = real(self, kind, name)
        store.publish_set({"name": "new", "samples": [{"text": [key]}]}, {})
        if again:
            store.publish("text", {"i": 1}, array, {"by": "second"})
        return aside

    monkeypatch.setattr(cache.Store, "set_aside", set_aside)
    collected = gc(store, now=time.time())
    assert (collected.put_back, collected.entries["text"]) == (1, ())
    assert store.read("text", key).attributes["made"] == {"by": "second" if again else "first"}
    assert [file.name for file in (store.path / "tmp").iterdir()] == ["zarr.json"]
