"""Two trainings in one run folder: the second is refused and named the first, which goes on unharmed."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny.project import Project

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import run_lock

HOLD = """
import sys
from pathlib import Path
from flux2_relay.pipeline import run_lock
with run_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_of_two_is_refused_and_told_who_trains(encoded: Callable[..., Project]) -> None:
    project = encoded()
    assert project.relay("train", "--max-steps", 1).status == 0
    before = {path: path.read_bytes() for path in project.run.iterdir() if path.is_file() and path.name != ".lock"}
    with holder(project.run) as process:
        outcome = project.relay("train")
        assert outcome.status == 2
        assert f"is being trained by process {process.pid} on {socket.gethostname()}" in outcome.said
        assert "loaded" not in outcome.said
        assert all(path.read_bytes() == data for path, data in before.items())
    outcome = project.relay("train")  # the lock went with the process that was killed
    assert outcome.status == 0, outcome.said
    assert len(project.metrics("step")) == 6


def test_a_lock_is_let_go_of_where_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock.hold(tmp_path):
        raise ZeroDivisionError
    with run_lock.hold(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), run_lock.hold(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == ""


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(
    ("holding", "refused"),
    [("1 HOST", True), ("4194305 HOST", False), ("1 elsewhere", False), ("", False), ("no number", False)],
)
def test_without_locks_a_living_process_of_this_machine_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holding: str, refused: bool
) -> None:
    """Process 1 is always alive, one above the greatest number that Linux gives never."""
    monkeypatch.setattr(fcntl, "flock", without_locks)
    (tmp_path / ".lock").write_text(holding.replace("HOST", socket.gethostname()))
    if refused:
        with pytest.raises(InputError, match="being trained by process 1 on"), run_lock.hold(tmp_path):
            pass
    else:
        with run_lock.hold(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"
