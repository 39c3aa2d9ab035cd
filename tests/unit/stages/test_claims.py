"""What processes that fill one store tell each other: nothing is made twice, and nobody waits for the dead."""

import errno
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
from tiny.project import Project

from flux2_relay import cache
from flux2_relay.cache import audit
from flux2_relay.stages.encode import claims as module
from flux2_relay.stages.encode.claims import Claims

TIMEOUT = 120  # seconds until a hanging process fails the test
HELD = """
import sys, time
from pathlib import Path
from flux2_relay.pipeline import cli
from flux2_relay.stages.encode import text

mark, run = Path(sys.argv.pop(1)), text.TextEncoder._run

def held(*arguments):
    (mark / "inside").touch()
    while not (mark / "go").exists():
        time.sleep(0.01)
    return run(*arguments)

text.TextEncoder._run = held
cli.main()
"""
"""An encoder that stops in the middle of its first pass, until it is told to go on."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tmp/claims"


def waits_for(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> list[float]:
    """What happens when somebody has waited once -> all waits."""
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        assert len(waits) < 100, "waits for ever"
        happens()

    monkeypatch.setattr(Claims.__init__, "__defaults__", (wait,))
    return waits


def test_what_one_has_taken_another_does_not_get(folder: Path) -> None:
    with Claims(folder) as first, Claims(folder) as second:
        assert first.take(["a", "b"]) == ["a", "b"]
        assert second.take(["b", "c", "a"]) == ["c"]
        assert (first.others("abc"), second.others("abc")) == (["c"], ["a", "b"])
        assert (first.free("abc"), second.free("abc")) == (["a", "b"], ["c"])
        first.release()
        assert second.take(["a", "b"]) == ["a", "b"]
    assert not folder.exists(), "nothing is left behind"


def test_a_wait_ends_when_it_is_there_or_let_go_of(folder: Path) -> None:
    waits: list[float] = []
    there: set[str] = set()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        there.add("a")
        if len(waits) == 3:
            first.release()

    with Claims(folder) as first, Claims(folder, wait) as second:
        first.take(["a", "b"])
        second.wait_for(["a", "b", "c"], there.__contains__)
    assert len(waits) == 3
    assert there == {"a"}


def owned_by(folder: Path, key: str, pid: int, host: str) -> Path:
    """A claim of a process that need not exist -> the file that it signs."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"by-{pid}-0123abcd-{host}"
    (folder / key).write_text(name)
    (folder / name).touch()
    return folder / name


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_claims_of_a_dead_process_are_taken_over_at_once(folder: Path) -> None:
    owned_by(folder, "a", gone(), socket.gethostname())
    owned_by(folder, "b", os.getppid(), socket.gethostname())
    claims = Claims(folder)
    assert claims.others("ab") == ["b"]
    assert claims.take("ab") == ["a"]
    with Claims(folder) as other:
        assert other.others("ab") == ["a", "b"]


def test_what_dead_processes_left_is_swept_up(folder: Path) -> None:
    signed = owned_by(folder, "a", gone(), socket.gethostname())
    alive = owned_by(folder, "b", 1, "another-host")
    with Claims(folder):
        assert not signed.exists()
        assert not (folder / "a").exists()
        assert alive.exists()
        assert (folder / "b").exists()


@pytest.mark.parametrize(("age", "expected"), [(500, []), (700, ["a"])])
def test_of_another_machine_its_sign_of_life_decides(folder: Path, age: float, expected: list[str]) -> None:
    signed = owned_by(folder, "a", 1, "another-host-of-a-name-with-dashes")
    then = time.time() - age
    os.utime(signed, (then, then))
    assert Claims(folder).take("a") == expected


def test_a_process_that_works_shows_that_it_lives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    claims = Claims(folder)
    claims.take("a")
    (signed,) = folder.glob("by-*")
    os.utime(signed, (1.0, 1.0))
    claims.sign()
    assert signed.stat().st_mtime == 1.0, "not at every call"
    now[0] += 11
    claims.sign()
    assert signed.stat().st_mtime > 1.0


def test_claims_of_a_process_that_works_are_no_old_leftover(tmp_path: Path) -> None:
    """The folder itself changes only when something is claimed or let go of; a pass may take more than a day."""
    store = cache.open(tmp_path / "store.zarr", "a")
    claims = Claims(store.path / "tmp/claims")
    claims.take("a")
    os.utime(store.path / "tmp/claims", (1.0, 1.0))
    claims._signed = -inf
    claims.sign()
    assert (store.path / "tmp/claims").stat().st_mtime > 1.0
    audit.sweep(store, now=time.time())
    assert Claims(store.path / "tmp/claims").others("a") == ["a"]


def test_a_claim_that_names_nobody_counts_while_it_is_young(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "a").touch()
    assert Claims(folder).take("a") == []
    os.utime(folder / "a", (1.0, 1.0))
    assert Claims(folder).take("a") == ["a"]


def test_a_folder_that_went_with_another_is_made_again(folder: Path) -> None:
    with Claims(folder) as first:
        first.take("a")
        first.release()
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
        assert first.take("b") == ["b"]
        assert Claims(folder).others("b") == ["b"]


def test_a_full_disk_leaves_no_claim_that_names_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a file fits where its content does not; the next one would wait for it for ten minutes."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(place: Path, mode: str) -> Full:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL))
        return Full()

    monkeypatch.setattr(module, "open", full, raising=False)
    claims = Claims(folder)
    assert claims.take(["a"]) == ["a"]
    assert claims.others(["a"]) == Claims(folder).others(["a"]) == []


def test_where_nothing_can_be_written_everybody_works_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Claims(tmp_path / "file/claims") as claims:
        assert claims.take("ab") == ["a", "b"]
        assert claims.others("ab") == []
        claims.release()


def held(project: Project, mark: Path) -> subprocess.Popen[str]:
    """An encoder in the middle of its only pass."""
    mark.mkdir()
    command = [sys.executable, "-c", HELD, str(mark), "encode", "-c", str(project.config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + TIMEOUT
    while not (mark / "inside").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_two_encoders_share_one_pass(
    dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "p", dev, pictures).write({"encode": {"bits": 32, "stream": "always"}})
    first = held(project, tmp_path / "mark")
    waits_for(monkeypatch, lambda: ((tmp_path / "mark/go").touch(), time.sleep(0.3)))
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    said, _ = first.communicate(timeout=TIMEOUT)
    assert first.returncode == 0, said
    assert "waiting for 9 entries that another process is making" in outcome.said
    assert "text encoder (" not in outcome.said, "there was nothing for it to encode"
    assert "encoded 0 captions and 5 images" in outcome.said
    assert "encoded 7 captions and 0 images" in said
    store = cache.open(project.store)
    (record,) = store.sets()
    assert store.missing(record) == {}
    assert audit.verify(store).leftovers == 0


def test_who_is_killed_in_a_pass_is_not_waited_for(
    dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "p", dev, pictures).write({"encode": {"bits": 32, "stream": "always"}})
    first = held(project, tmp_path / "mark")
    first.kill()
    first.communicate(timeout=TIMEOUT)
    assert any((project.store / "tmp/claims").iterdir())
    waits = waits_for(monkeypatch, lambda: None)
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    assert waits == []
    assert "encoded 7 captions and 5 images" in outcome.said
    assert not (project.store / "tmp/claims").exists()
