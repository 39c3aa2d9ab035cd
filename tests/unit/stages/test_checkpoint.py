"""Checkpoints appear whole, and a damaged one is gone back over."""

# pyright: reportArgumentType=false, reportCallIssue=false

import hashlib
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages import files
from flux2_relay.stages.train import checkpoint
from flux2_relay.stages.train.checkpoint import Checkpoint, State


def at(step: int) -> Checkpoint:
    return Checkpoint(
        state=State(step=step, seed=7, set="abc"),
        adapter={"x.lora_A.weight": mx.full((2, 3), float(step))},
        optimizer={"step": mx.array(step, mx.uint64), "x.lora_A.weight|m": mx.full((2, 3), 0.5)},
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.saved(folder)]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path / "c", at(12), keep=2)
    assert place == tmp_path / "c/000012"
    found = checkpoint.load(place)
    assert found.state == at(12).state
    for part in ("adapter", "optimizer"):
        values, expected = getattr(found, part), getattr(at(12), part)
        assert values.keys() == expected.keys()
        assert all(mx.array_equal(values[name], expected[name]) for name in expected)
        assert all(values[name].dtype == expected[name].dtype for name in expected)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 999_999, 1_000_000):  # by number, not by name
        checkpoint.save(tmp_path, at(step), keep=3)
    assert names(tmp_path) == ["000010", "999999", "1000000"]
    newest, complaints = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.state.step == 1_000_000
    assert complaints == []


def test_without_a_folder_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.saved(tmp_path / "no") == []
    assert checkpoint.latest(tmp_path / "no") == (None, [])


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, at(5), keep=2)
    again = Checkpoint(state=at(5).state, adapter={"y": mx.zeros(1)}, optimizer={})
    checkpoint.save(tmp_path, again, keep=2)
    assert set(checkpoint.load(tmp_path / "000005").adapter) == {"y"}
    assert names(tmp_path) == ["000005"]


def damage_missing(place: Path, file: str) -> None:
    (place / file).unlink()


def damage_cut(place: Path, file: str) -> None:
    data = (place / file).read_bytes()
    (place / file).write_bytes(data[: len(data) - 10])


def damage_empty(place: Path, file: str) -> None:
    (place / file).write_bytes(b"")


def damage_garbage(place: Path, file: str) -> None:
    (place / file).write_bytes(b"\xff" * 300)


def damage_bit(place: Path, file: str) -> None:
    """In the last number of a tensor, or of the state: the file reads as well as before."""
    data = bytearray((place / file).read_bytes())
    at = len(data) - 2 if file != "state.json" else data.index(b'"seed": 7') + 8
    data[at] ^= 1
    (place / file).write_bytes(data)


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [damage_missing, damage_cut, damage_empty, damage_garbage, damage_bit])
def test_latest_goes_back_over_damaged_ones_and_says_so(tmp_path: Path, file: str, damage) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, at(step), keep=4)
    damage(tmp_path / "000003", file)
    shutil.rmtree(tmp_path / "000002")
    (tmp_path / "000002").mkdir()
    found, complaints = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state.step == 1
    assert len(complaints) == 2
    assert str(tmp_path / "000003") in complaints[0]
    assert str(tmp_path / "000002") in complaints[1]


def test_a_flipped_bit_reads_well_and_is_noticed_by_the_checksum_alone(tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path, at(1), keep=1)
    for file in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        damage_bit(place, file)
    with pytest.raises(InputError, match=r"safetensors: is damaged"):
        checkpoint.load(place)
    with pytest.raises(InputError, match=r"state\.json: is damaged"):
        checkpoint.load_state(place)
    (place / checkpoint.SUMS).unlink()  # as an older release left it
    found = checkpoint.load(place)
    assert found.state.seed == 6
    assert not mx.array_equal(found.adapter["x.lora_A.weight"], at(1).adapter["x.lora_A.weight"])


def test_the_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path, at(1), keep=1)
    lines = dict(reversed(line.split("  ")) for line in (place / checkpoint.SUMS).read_text().splitlines())
    files = sorted(path for path in place.iterdir() if path.name != checkpoint.SUMS)
    assert lines == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(files) == 3


def test_a_list_of_checksums_that_is_none_is_damage(tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path, at(1), keep=1)
    (place / checkpoint.SUMS).write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"SHA256SUMS"):
        checkpoint.load(place)


@pytest.mark.parametrize(
    "content",
    ["[]", "3", '{"step": 1}', '{"step": 1, "seed": 2, "set": "a", "more": 3}'],
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    place = checkpoint.save(tmp_path, at(1), keep=1)
    (place / "state.json").write_text(content)
    (place / checkpoint.SUMS).unlink()
    with pytest.raises(InputError, match=r"state\.json"):
        checkpoint.load(place)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(9))
def test_killed_in_the_middle_of_saving_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Every call that touches the disk is in turn the last one that the process makes."""
    checkpoint.save(tmp_path, at(1), keep=1)
    calls = iter(range(100))

    def dying(real):
        def wrapped(*arguments, **named):
            if next(calls) >= call:
                raise Killed
            return real(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(files.mx, "save_safetensors", dying(mx.save_safetensors))
        patch.setattr(files, "_sync", dying(files._sync))
        patch.setattr(files.os, "replace", dying(files.os.replace))
        patch.setattr(checkpoint.os, "rename", dying(checkpoint.os.rename))
        patch.setattr(checkpoint.durable, "sync_folder", dying(checkpoint.durable.sync_folder))
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, at(2), keep=1)
    found, complaints = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.state.step, complaints) == (1, [])
    checkpoint.save(tmp_path, at(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000002"]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, at(1), keep=1)
    did: list[tuple[str, str]] = []

    def noted(what: str, real):
        def wrapped(path, *arguments, **named):
            did.append((what, "the folder" if Path(path) == tmp_path else Path(path).name))
            return real(path, *arguments, **named)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.durable, "sync_folder", noted("sync", checkpoint.durable.sync_folder))
        patch.setattr(checkpoint.durable, "write_and_sync", noted("write", checkpoint.durable.write_and_sync))
        patch.setattr(checkpoint.os, "rename", noted("rename", checkpoint.os.rename))
        patch.setattr(checkpoint.shutil, "rmtree", noted("remove", checkpoint.shutil.rmtree))
        checkpoint.save(tmp_path, at(2), keep=1)
    aside = next(name for what, name in did if what == "rename")
    end = [("sync", aside), ("rename", aside), ("sync", "the folder"), ("remove", "000001")]
    assert did[-5:] == [("write", checkpoint.SUMS), *end]


def test_a_failing_disk_leaves_the_one_before_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, at(1), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(tmp_path, at(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]


def test_a_disk_that_does_not_hold_what_was_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mx.save_safetensors
    monkeypatch.setattr(
        files.mx, "save_safetensors", lambda path, values, *_: real(path, {n: v + 1 for n, v in values.items()})
    )
    with pytest.raises(RelayError, match="does not hold what was written"):
        files.write_tensors(tmp_path / "a.safetensors", {"x": mx.zeros(3)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new/a.safetensors"
    files.write_tensors(path, {"x": mx.zeros(3)}, {"step": "1"})
    files.write_tensors(path, {"y": mx.ones(2)}, {"step": "2"})
    values, metadata = files.read_tensors(path)
    assert set(values) == {"y"}
    assert metadata["step"] == "2"
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
