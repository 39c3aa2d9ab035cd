"""Writing that fails: at every single call of the file system, with the errors of disks, and Ctrl-C."""

import errno
import os
import shutil
import threading

import numpy as np
import pytest
from tiny.failing import FailingOs

from flux2_relay import cache
from flux2_relay.cache import durable, encoding
from flux2_relay.cache.audit import verify
from flux2_relay.cache.errors import InputError, RelayError, StoreError
from flux2_relay.cache.keys import key_of
from flux2_relay.cache.writer import Writer

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


def _count_calls(monkeypatch, act):
    counter = FailingOs(-1, OSError())
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", counter)
        act()
    return counter.calls


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _attempts(tmp_path, monkeypatch, act):
    """Yield (number of the failing call, its name, a fresh store) for every call that `act` makes."""
    template = cache.open(tmp_path / "template", "a")
    template.publish("text", {"there": True}, ARRAY, {})
    shutil.copytree(template.path, tmp_path / "trial")
    trial = cache.open(tmp_path / "trial", "a")
    for at, name in enumerate(_count_calls(monkeypatch, lambda: act(trial))):
        shutil.copytree(template.path, tmp_path / f"{at}")
        yield at, name, cache.open(tmp_path / f"{at}", "a", wait=lambda seconds: None)


def _publish(store):
    store.publish("text", {"x": 1}, ARRAY, {})


def _publish_set(store):
    store.publish_set({"name": "x"}, {"at": "1"})


@pytest.mark.parametrize("act", [_publish, _publish_set])
@pytest.mark.parametrize(("code", "after"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.EIO, True)])
def test_a_failing_call_leaves_the_store_as_it_was(tmp_path, monkeypatch, act, code, after):
    for at, name, store in _attempts(tmp_path, monkeypatch, act):
        if after and name == "rename":
            continue  # done but answered with an error, as NFS may: not a failure, tested below
        before = _files(store.path)
        with monkeypatch.context() as patch:
            failing = FailingOs(at, OSError(code, os.strerror(code)), after)
            patch.setattr(durable, "os", failing)
            with pytest.raises(RelayError, match=os.strerror(code)) as error:
                act(store)
        assert not isinstance(error.value, InputError)  # exit status 1, not 2
        renamed = "rename" in failing.calls[: at + after]
        if not renamed:
            assert _files(store.path) == before, (at, name)
        else:  # whole, durable before it had a name; only not acknowledged
            assert set(before.items()) < set(_files(store.path).items())
        assert list((store.path / "tmp").iterdir()) == [store.path / "tmp" / "zarr.json"], (at, name)
        assert verify(store).faults == ()
        act(store)  # the next run just goes on
        assert len(store.keys("text")) + len(store.set_keys()) == 2
        assert verify(store).faults == ()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_ctrl_c_at_any_call_leaves_the_store_as_it_was(tmp_path, monkeypatch, after):
    for at, name, store in _attempts(tmp_path, monkeypatch, _publish):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", FailingOs(at, KeyboardInterrupt(), after))
            with pytest.raises(KeyboardInterrupt):
                _publish(store)
        assert list((store.path / "tmp").iterdir()) == [store.path / "tmp" / "zarr.json"], (at, name)
        assert verify(store).faults == ()


def test_a_disk_that_stays_full_costs_no_entry(tmp_path, monkeypatch):
    for at, name, store in _attempts(tmp_path, monkeypatch, _publish):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", FailingOs(at, OSError(errno.ENOSPC, "full"), from_then_on=True))
            with pytest.raises(RelayError, match="What was committed before is kept"):
                _publish(store)
        np.testing.assert_array_equal(store.read("text", key_of({"there": True})).array, ARRAY)
        assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"], (at, name)


def test_bytes_are_on_the_disk_before_they_have_a_name(tmp_path, monkeypatch):
    store = cache.open(tmp_path / "s", "a")
    calls = _count_calls(monkeypatch, lambda: _publish(store))
    file = ["open", "write", "fsync", "close"]
    folder = ["open", "fsync", "close"]
    assert calls == ["mkdir", *file, *file, *folder, "rename", *folder]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    class ShortWrites(FailingOs):
        def __getattr__(self, name):
            return (lambda fd, data: os.write(fd, data[:7])) if name == "write" else getattr(os, name)

    store = cache.open(tmp_path / "s", "a")
    monkeypatch.setattr(durable, "os", ShortWrites(-1, OSError()))
    key = store.publish("text", {"x": 1}, ARRAY, {})
    np.testing.assert_array_equal(store.read("text", key).array, ARRAY)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch, code):
    class NoFolderSync(FailingOs):
        def __getattr__(self, name):
            return self.sync if name == "fsync" else getattr(os, name)

        def sync(self, fd):
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                raise OSError(code, os.strerror(code))
            os.fsync(fd)

    monkeypatch.setattr(durable, "os", NoFolderSync(-1, OSError()))
    store = cache.open(tmp_path / "s", "a")
    assert store.publish("text", {"x": 1}, ARRAY, {}) in store.keys("text")


@pytest.mark.parametrize("refused", [None, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_macos_gets_a_full_flush_or_else_a_plain_one(tmp_path, monkeypatch, refused):
    flushed, synced = [], []

    class Mac:
        def fcntl(self, fd, command):
            assert command == 51
            if refused is not None:
                raise OSError(refused, os.strerror(refused))
            flushed.append(fd)

    class CountingOs(FailingOs):
        def __getattr__(self, name):
            return synced.append if name == "fsync" else getattr(os, name)

    monkeypatch.setattr(durable, "fcntl", Mac())
    monkeypatch.setattr(durable, "_FULL_FLUSH", 51)
    store = cache.open(tmp_path / "s", "a")
    flushed.clear()
    monkeypatch.setattr(durable, "os", CountingOs(-1, OSError()))
    store.publish("text", {"x": 1}, ARRAY, {})
    assert (len(flushed), len(synced)) == ((2, 2) if refused is None else (0, 4))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_store_is_refused_before_any_work_and_still_read(tmp_path, monkeypatch, code):
    store = cache.open(tmp_path / "s", "a")
    key = store.publish("text", {"x": 1}, ARRAY, {})
    before = _files(store.path)
    monkeypatch.setattr(durable, "os", FailingOs(0, OSError(code, os.strerror(code)), from_then_on=True))
    with pytest.raises(StoreError, match=r"cannot be written .* to encode, make it writable"):
        cache.open(store.path, "a")
    with pytest.raises(StoreError, match="cannot be written"):
        store.publish("text", {"x": 2}, ARRAY, {})
    with pytest.raises(StoreError, match="cannot be created"):
        cache.open(tmp_path / "new", "a")
    reader = cache.open(store.path)
    np.testing.assert_array_equal(reader.read("text", key).array, ARRAY)
    assert verify(reader).sound
    assert _files(store.path) == before


def test_a_failed_skeleton_leaves_nothing(tmp_path, monkeypatch):
    calls = _count_calls(monkeypatch, lambda: cache.open(tmp_path / "trial", "a"))
    for at in range(0, calls.index("rename") + 1, 3):
        folder = tmp_path / str(at)
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", FailingOs(at, OSError(errno.EIO, "broken")))
            with pytest.raises(StoreError, match="cannot be created: broken"):
                cache.open(folder / "store.zarr", "a")
        assert list(folder.iterdir()) == []


def test_a_file_in_an_entrys_place_is_an_error_not_a_win(tmp_path):
    """`publish` looks first and takes it away; this one came since."""
    store = cache.open(tmp_path / "s", "a")
    key, node = key_of({"x": 1}), encoding.build("text", {"x": 1}, ARRAY, {}, "zstd")
    (store.path / "text" / key).write_bytes(b"x")
    with pytest.raises(RelayError, match="Not a directory"):
        store.publish_node("text", key, node)
    assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"]
    assert (store.path / "text" / key).read_bytes() == b"x"
    assert store.publish("text", {"x": 1}, ARRAY, {}) == key
    np.testing.assert_array_equal(store.read("text", key).array, ARRAY)


def test_a_rename_that_was_done_and_yet_failed_is_a_commit(tmp_path, monkeypatch):
    store = cache.open(tmp_path / "s", "a")
    at = _count_calls(monkeypatch, lambda: _publish(store)).index("rename")
    monkeypatch.setattr(durable, "os", FailingOs(at, OSError(errno.ENOENT, "sent twice"), after=True))
    key = store.publish("text", {"x": 2}, ARRAY, {})
    np.testing.assert_array_equal(store.read("text", key).array, ARRAY)


def test_losing_the_race_for_a_key_keeps_the_winners_bits(tmp_path, monkeypatch):
    store = cache.open(tmp_path / "s", "a")

    class Late(FailingOs):
        def __getattr__(self, name):
            return self.rename if name == "rename" else getattr(os, name)

        def rename(self, source, place):
            monkeypatch.setattr(durable, "os", os)
            store.publish("text", {"x": 1}, ARRAY + 1, {"by": "winner"})
            os.rename(source, place)

    monkeypatch.setattr(durable, "os", Late(-1, OSError()))
    key = store.publish("text", {"x": 1}, ARRAY, {"by": "loser"})
    entry = store.read("text", key)
    assert entry.attributes["made"] == {"by": "winner"}
    np.testing.assert_array_equal(entry.array, ARRAY + 1)
    assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"]


def test_the_writer_commits_everything_even_after_ctrl_c(tmp_path):
    store = cache.open(tmp_path / "s", "a")
    keys = set()

    def encode():
        with Writer(store, depth=2) as writer:
            for i in range(12):
                keys.add(writer.put("text", {"i": i}, ARRAY, {}))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode()
    assert store.keys("text") == keys
    assert len(keys) == 12


def test_the_writer_passes_its_failure_on_and_stops_writing(tmp_path, monkeypatch):
    store = cache.open(tmp_path / "s", "a")
    failing = FailingOs(0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(durable, "os", failing)

    def encode(array, count):
        with Writer(store, depth=1) as writer:
            for i in range(count):
                writer.put("text", {"i": i}, array, {})

    with pytest.raises(RelayError, match="No space left"):
        encode(ARRAY, 1000)
    assert failing.calls == ["mkdir"]
    assert store.keys("text") == set()
    with pytest.raises(InputError, match="not finite"):
        encode(ARRAY * np.nan, 1)


def test_the_writer_notes_its_failure_on_another_error(tmp_path):
    store = cache.open(tmp_path / "s", "a")

    def encode():
        with Writer(store) as writer:
            writer.put("text", {"i": 0}, ARRAY * np.nan, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        encode()
    assert "not finite" in error.value.__notes__[0]


def test_the_writer_holds_no_more_than_its_depth(tmp_path, monkeypatch):
    store = cache.open(tmp_path / "s", "a")
    gate, blocked = threading.Event(), threading.Event()
    monkeypatch.setattr(cache.Store, "publish", lambda self, *item: gate.wait())
    writer = Writer(store, depth=2)

    def feed():
        for i in range(4):  # one with the thread, two in the queue; the fourth blocks
            writer.put("text", {"i": i}, ARRAY, {})
        blocked.set()

    with writer:
        feeder = threading.Thread(target=feed)
        feeder.start()
        assert not blocked.wait(0.3)
        gate.set()
        feeder.join()
    assert blocked.is_set()
