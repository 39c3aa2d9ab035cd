"""Random operations on a store, against a dictionary."""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from tiny.failing import FailingOs

from flux2_relay import cache
from flux2_relay.cache import durable
from flux2_relay.cache.audit import gc, verify
from flux2_relay.cache.keys import key_of

KIND = st.sampled_from(["text", "masks"])
SMALL = st.integers(0, 3)
DTYPE = st.sampled_from(["float16", "float32"])


class Died(BaseException):
    """The end of the process."""


class StoreMachine(RuleBasedStateMachine):
    """The store beside what it should hold: (kind, key) -> array, and set key -> the keys it names."""

    sets = Bundle("sets")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = self._open()
        self.arrays: dict[tuple[str, str], np.ndarray] = {}
        self.pins: dict[str, set[str]] = {}

    def _open(self):
        return cache.open(self.folder / "store.zarr", "a", wait=lambda seconds: None)

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(
        kind=KIND,
        number=SMALL,
        fill=st.floats(-10, 10, width=16),
        dtype=st.sampled_from(["float16", "float32"]),
    )
    def publish(self, kind, number, fill, dtype):
        array = np.full((number + 1, 2), fill, dtype)
        key = self.store.publish(kind, {"number": number}, array, {"fill": float(fill)})
        self.arrays.setdefault((kind, key), array)

    @rule(
        kind=KIND,
        number=SMALL,
        at=st.integers(0, 20),
        act=st.sampled_from(["publish", "remove", "set", "gc", "repair"]),
    )
    def crash(self, kind, number, at, act):
        """The process dies at a call of the file system: nothing after it happens, no cleaning up either."""
        key_object, array = {"number": number}, np.full((number + 1, 2), 7, np.float32)
        key, before = key_of(key_object), self.store.keys(kind)
        body = {"name": "c", "samples": [{"text": [key]}]}
        acts = {
            "publish": lambda: self.store.publish(kind, key_object, array, {}),
            "remove": lambda: self.store.remove(kind, key) if key in before else None,
            "set": lambda: self.store.publish_set(body, {"at": "1"}),
            "gc": lambda: gc(self.store, now=0),
            "repair": lambda: verify(self.store, repair=True),
        }
        if act == "repair" and self.arrays.pop((kind, key), None) is not None:
            (self.store.path / kind / key / "c.0.0").write_bytes(b"")
        with (
            mock.patch.object(durable, "os", FailingOs(at, Died(), from_then_on=True)),
            mock.patch.object(durable.shutil, "rmtree", side_effect=Died()),
            suppress(Died),
        ):
            acts[act]()
        if act == "repair":  # by whoever comes next
            verify(self.store, repair=True)
        there = {(of, name) for of in ("text", "masks", "latents") for name in self.store.keys(of)}
        if act == "publish" and (kind, key) in there:
            self.arrays.setdefault((kind, key), array)
        if act == "set" and key_of(body) in self.store.set_keys():
            self.pins[key_of(body)] = {key}
        if act in ("remove", "gc"):
            self._check_only_these_went(there, {(kind, key)} if act == "remove" else self._garbage())
        if act == "repair":
            assert there == self.arrays.keys()
        assert verify(self.store).faults == ()

    def _check_only_these_went(self, there, allowed):
        assert self.arrays.keys() - there <= allowed
        self.arrays = {name: array for name, array in self.arrays.items() if name in there}

    def _garbage(self):
        pinned = set().union(*self.pins.values())
        return {name for name in self.arrays if name[1] not in pinned}

    @rule(kind=KIND, number=SMALL)
    def remove(self, kind, number):
        key = key_of({"number": number})
        if (kind, key) in self.arrays:
            self.store.remove(kind, key)
            del self.arrays[kind, key]

    @rule(target=sets, numbers=st.sets(SMALL), name=st.sampled_from("ab"))
    def publish_set(self, numbers, name):
        keys = [key_of({"number": number}) for number in sorted(numbers)]
        key = self.store.publish_set({"name": name, "samples": [{"text": keys}]}, {"at": "1"})
        self.pins[key] = set(keys)
        return key

    @rule(target=sets, key=consumes(sets))
    def drop_set(self, key):
        if key in self.pins:
            gc(self.store, now=0, drop=[key])
            del self.pins[key]
            self._forget_garbage()
        return multiple()

    @rule()
    def collect(self):
        gc(self.store, now=0)
        self._forget_garbage()

    @rule(kind=KIND, number=SMALL)
    def damage_and_repair(self, kind, number):
        key = key_of({"number": number})
        if (kind, key) in self.arrays:
            (self.store.path / kind / key / "c.0.0").write_bytes(b"")
            assert [fault.key for fault in verify(self.store, repair=True).faults] == [key]
            del self.arrays[kind, key]

    @rule()
    def reopen(self):
        self.store = self._open()

    def _forget_garbage(self):
        pinned = set().union(*self.pins.values())
        self.arrays = {name: array for name, array in self.arrays.items() if name[1] in pinned}

    @invariant()
    def holds_what_it_should(self):
        for kind in ("text", "masks", "latents"):
            assert self.store.keys(kind) == {key for k, key in self.arrays if k == kind}
        assert {record.key for record in self.store.sets()} == set(self.pins)
        for record in self.store.sets():
            missing = {key for key in self.pins[record.key] if ("text", key) not in self.arrays}
            assert set(self.store.missing(record).get("text", ())) == missing

    @rule()
    def read_everything(self):
        for (kind, key), array in self.arrays.items():
            np.testing.assert_array_equal(self.store.read(kind, key).array, array, strict=True)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
