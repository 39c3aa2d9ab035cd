"""Identities of weights: equal for equal values however they are laid out, different for one changed weight."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import identity
from flux2_relay.stages.weights import Tensors, open_tensors

VALUES = {f"t{n}": mx.random.normal((50, 40), key=mx.random.key(n)) for n in range(6)}


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty memory, and the folder it stands in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    return tmp_path / "memory"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that were hashed, as they are."""
    names: list[str] = []
    real: Callable = identity._tensor_digest

    def digest(info) -> str:
        names.append(info.name)
        return real(info)

    monkeypatch.setattr(identity, "_tensor_digest", digest)
    return names


def save(folder: Path, *parts: dict[str, mx.array]) -> Tensors:
    folder.mkdir()
    for number, part in enumerate(parts):
        mx.save_safetensors(str(folder / f"{number}.safetensors"), part)
    return open_tensors(folder)


def of(tensors: Tensors, config: dict[str, object] | None = None) -> str:
    return identity.weights_identity(tensors, tensors.info, config or {})


def test_layout_does_not_matter(tmp_path: Path) -> None:
    single = of(save(tmp_path / "single", VALUES))
    names = list(VALUES)
    halves = [{name: VALUES[name] for name in part} for part in (names[:2], names[2:])]
    assert of(save(tmp_path / "sharded", *halves)) == single
    other = save(tmp_path / "renamed", {f"model.{name}": value for name, value in VALUES.items()})
    assert of(other) != single
    assert of(other.rename(lambda name: name.removeprefix("model."))) == single


def test_every_part_matters(tmp_path: Path) -> None:
    first = save(tmp_path / "first", VALUES)
    changed = VALUES["t3"] * 1.0
    changed[7, 9] += 1e-6
    fine_tuned = save(tmp_path / "tuned", VALUES | {"t3": changed})
    shorter = save(tmp_path / "half", VALUES | {"t3": VALUES["t3"].astype(mx.float16)})
    turned = save(tmp_path / "turned", VALUES | {"t3": VALUES["t3"].reshape(40, 50)})
    found = {of(t) for t in (first, fine_tuned, shorter, turned)}
    found |= {of(first, {"heads": 4}), of(first, {"heads": 5}), identity.weights_identity(first, ["t0"], {})}
    assert len(found) == 7


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    tensors = save(tmp_path / "x", {"a": VALUES["t0"]})
    info = tensors.info["a"]
    whole = info.file.read_bytes()
    expected = hashlib.sha256(whole[info.start : info.end]).hexdigest()
    assert identity.tensor_digests([info]) == {(info.file, "a"): expected}


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    tensors = save(tmp_path / "x", VALUES)
    assert not identity.is_remembered(tensors)
    first = identity.weights_identity(tensors, ["t0", "t1"], {})
    assert sorted(hashed) == ["t0", "t1"]
    assert identity.is_remembered(Tensors(tensors.source, {name: tensors.info[name] for name in ("t0", "t1")}))
    assert not identity.is_remembered(tensors)
    assert identity.weights_identity(open_tensors(tmp_path / "x"), ["t0", "t1"], {}) == first
    assert len(hashed) == 2
    of(tensors)
    assert sorted(hashed) == sorted(VALUES)  # what was known is kept when the rest is hashed


def test_hashing_beforehand_tells_its_bytes_and_keeps_what_an_interruption_leaves(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = save(tmp_path / "x", VALUES)
    monkeypatch.setattr(identity, "_SMALL", 1)  # each tensor is a part of its own

    def stop(size: int) -> None:
        if len(hashed) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        identity.remember(tensors, stop)
    assert not identity.is_remembered(tensors)
    told: list[int] = []
    identity.remember(tensors, told.append)
    assert identity.is_remembered(tensors)
    assert sum(told) == identity.size_of(tensors)
    assert sorted(hashed) == sorted(VALUES), "none twice"


@pytest.mark.parametrize("at", [0.002, 0.5, 1.0])
def test_the_tripwire_sees_a_change_behind_unchanged_facts(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, at: float
) -> None:
    monkeypatch.setattr(identity, "_facts", lambda path: "always the same")
    tensors = save(tmp_path / "x", VALUES)
    first = of(tensors)
    file = tensors.info["t0"].file
    base, size = min(info.start for info in tensors.info.values()), file.stat().st_size
    data = bytearray(file.read_bytes())
    data[min(size - 1, base + int(at * (size - base)))] ^= 0xFF
    file.write_bytes(data)
    assert of(open_tensors(tmp_path / "x")) != first
    assert len(hashed) == 2 * len(VALUES)


def test_a_copy_is_hashed_anew_and_equal(tmp_path: Path, hashed: list[str]) -> None:
    first = of(save(tmp_path / "x", VALUES))
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    assert of(open_tensors(tmp_path / "y")) == first
    assert len(hashed) == 2 * len(VALUES)


def test_a_blob_of_the_hub_cache_is_known_by_its_name(tmp_path: Path, hashed: list[str]) -> None:
    for machine in ("one", "two"):
        blobs, snapshot = tmp_path / machine / "blobs", tmp_path / machine / "snapshots/x"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        mx.save_safetensors(str(tmp_path / "t.safetensors"), VALUES)
        data = (tmp_path / "t.safetensors").read_bytes()
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / "m.safetensors").symlink_to(blob)
    assert of(open_tensors(tmp_path / "one/snapshots/x")) == of(open_tensors(tmp_path / "two/snapshots/x"))
    assert len(hashed) == len(VALUES)


@pytest.mark.parametrize("state", ["a file stands there", "read-only", "no database"])
def test_without_a_memory_it_only_takes_longer(
    tmp_path: Path, hashed: list[str], memory: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = save(tmp_path / "x", VALUES)
    expected = of(tensors)
    shutil.rmtree(memory)
    if state == "a file stands there":
        memory.write_bytes(b"")
    elif state == "no database":
        (memory / "flux2-relay").mkdir(parents=True)
        (memory / "flux2-relay/digests.sqlite").write_bytes(b"no database at all" * 100)
    else:
        connect = identity.sqlite3.connect

        def read_only(path: Path, timeout: float):
            connect(path).close()
            return connect(f"file:{path}?mode=ro", uri=True, timeout=timeout)

        monkeypatch.setattr(identity.sqlite3, "connect", read_only)
    assert of(tensors) == expected
    assert of(tensors) == expected
    assert len(hashed) == 3 * len(VALUES)
    assert not identity.is_remembered(tensors)
    assert identity.is_cheap(tensors)  # since it is small


def test_a_small_file_is_hashed_once(tmp_path: Path, memory: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    assert identity.file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    with identity.Memo() as memo:
        memo.put("file|" + identity._facts(path), "remembered")
    assert identity.file_sha256(path) == "remembered"
    path.write_bytes(b"other")
    assert identity.file_sha256(path) == hashlib.sha256(b"other").hexdigest()


def test_a_file_written_just_now_is_not_remembered(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written again within one tick of the file system's clock, with as many bytes, it looks the same."""
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", 2.0)
    path, tensors = tmp_path / "a.png", save(tmp_path / "x", VALUES)
    path.write_bytes(b"one")
    monkeypatch.setattr(identity, "_facts", lambda path: "always the same")
    assert identity.file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    assert identity.file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    assert of(tensors) == of(tensors)
    assert len(hashed) == 2 * len(VALUES)
    now = identity.time.time()
    monkeypatch.setattr(identity.time, "time", lambda: now + 3)
    identity.file_sha256(path)
    path.write_bytes(b"six")
    assert identity.file_sha256(path) == hashlib.sha256(b"two").hexdigest()  # its times would have told, later on


def test_what_changes_while_it_is_hashed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "a.png", identity._sha256
    path.write_bytes(b"one")

    def sha256(of: Path) -> str:
        found = real(of)
        path.write_bytes(b"another")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(identity, "_sha256", sha256)
        facts = identity._facts(path)
        identity.file_sha256(path)
    with identity.Memo() as memo:
        assert memo.get(f"file|{facts}") is None


def test_a_file_that_is_another_by_now_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    sha256 = identity.file_sha256(path)
    identity.confirm(path, sha256)
    path.write_bytes(b"two")
    with pytest.raises(InputError, match=r"a\.png: was changed while this command ran; run it again"):
        identity.confirm(path, sha256)


def test_the_memory_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    assert identity.memory_folder() == memory / "flux2-relay"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert identity.memory_folder() in (
        Path("/home/somebody/.cache/flux2-relay"),
        Path("/home/somebody/Library/Caches/flux2-relay"),
    )
