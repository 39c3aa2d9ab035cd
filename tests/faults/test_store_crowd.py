"""Four processes write overlapping entries while a fifth collects garbage; and other tools read what they wrote."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from flux2_relay import cache
from flux2_relay.cache.audit import gc, verify
from flux2_relay.cache.keys import key_of

ENTRIES, EACH = 400, 160  # four processes times 160 entries: each of the 400 is in one or two of them

WRITER = """
import sys
import numpy as np
from flux2_relay import cache
from flux2_relay.cache.keys import key_of

path, first, count, total = sys.argv[1], *map(int, sys.argv[2:5])
entries = [{"kind": "text", "dtype": "float32", "i": (first + i) % total} for i in range(count)]
store = cache.open(path, "a")
sys.stdin.readline()
body = {"name": f"from {first}", "samples": [{"text": [key_of(entry) for entry in entries]}]}
record = store.open_set(store.publish_set(body, {"at": str(first)}))
while missing := store.missing(record, patient=False):
    for entry in entries:
        key = key_of(entry)
        if key in missing["text"]:
            array = np.random.default_rng(entry["i"]).standard_normal((20, 300), dtype=np.float32)
            print(store.publish("text", entry, array, {"by": first}), flush=True)
"""

COLLECTOR = """
import sys, time
from flux2_relay import cache
from flux2_relay.cache.audit import gc

store, rounds, removed = cache.open(sys.argv[1], "a"), 0, 0
print("ready", flush=True)
while not store.path.with_name("stop").exists():
    removed += sum(map(len, gc(store, now=time.time()).entries.values()))
    rounds += 1
print(rounds, removed)
"""


def _start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_four_processes_write_400_entries_while_gc_runs_and_nothing_is_lost(tmp_path):
    path = tmp_path / "store.zarr"
    store = cache.open(path, "a")
    keys = {key_of({"kind": "text", "dtype": "float32", "i": i}): i for i in range(ENTRIES)}
    for i in range(20):  # garbage, and entries that look like garbage until a set names them
        planted_entry = {"kind": "text", "dtype": "float32", "i": i * 20 + (i % 2) * 1000}
        store.publish("text", planted_entry, np.ones((1, 2), np.float32), {})
    planted = store.keys("text")
    writers = [_start(WRITER, path, first, EACH, ENTRIES) for first in range(0, ENTRIES, ENTRIES // 4)]
    with _start(COLLECTOR, path) as collector:
        assert collector.stdout is not None
        assert collector.stdout.readline() == "ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        printed = [writer.communicate()[0].split() for writer in writers]
        assert [writer.returncode for writer in writers] == [0] * 4
        (tmp_path / "stop").touch()
        rounds, removed = map(int, collector.communicate()[0].split())
        assert collector.returncode == 0
    assert rounds > 1
    assert removed > 0
    assert {key for keys_of in printed for key in keys_of} | planted >= set(keys)
    gc(store, now=time.time())
    assert store.keys("text") == set(keys)
    found = verify(store)
    assert (found.faults, found.missing, found.leftovers) == ((), {}, 0)
    for key, i in keys.items():
        array = store.read("text", key).array
        if array.shape != (1, 2):  # a planted one that was named in time
            expected = np.random.default_rng(i).standard_normal((20, 300), dtype=np.float32)
            np.testing.assert_array_equal(array, expected, strict=True)


RNG = np.random.default_rng(0)
GOLDEN = {
    "text": ({"kind": "text", "dtype": "bfloat16"}, RNG.integers(0, 0x7000, (5, 40)).astype(np.uint16)),
    "latents": ({"kind": "latents", "dtype": "float16"}, RNG.standard_normal((3, 4, 8)).astype(np.float16)),
    "masks": ({"kind": "masks"}, RNG.random((4, 6), dtype=np.float32)),
}


@pytest.mark.parametrize("written_by", ["zarr-3.1.6", "zarr-3.4.2"])
def test_a_store_of_another_version_of_zarr_is_read_and_written_alike(request, tmp_path, written_by):
    """Fixtures: what `publish` wrote under each version."""
    old = cache.open(request.path.parent / "fixtures" / written_by)
    new = cache.open(tmp_path / "new.zarr", "a")
    assert verify(old).checked == 3
    assert verify(old).faults == ()
    for kind, (key_object, array) in GOLDEN.items():
        key = new.publish(kind, key_object, array, {})
        np.testing.assert_array_equal(old.read(kind, key).array, array, strict=True)
        metadata = [json.loads((store.path / kind / key / "zarr.json").read_bytes()) for store in (old, new)]
        for told in metadata:
            told["attributes"]["flux2_relay"].pop("stored_bytes")  # another blosc may compress a byte better
        assert metadata[0] == metadata[1]


def test_tensorstore_and_plain_zarr_read_equal_arrays(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    store = cache.open(tmp_path / "store.zarr", "a")
    for kind, (key_object, array) in GOLDEN.items():
        place = store.path / kind / store.publish(kind, key_object, array, {})
        kvstore = {"driver": "file", "path": str(place)}
        by_tensorstore = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result().read().result()
        for read in (by_tensorstore, zarr.open_array(place, mode="r")[...]):
            np.testing.assert_array_equal(read, array, strict=True)
