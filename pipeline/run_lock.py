"""One training a run folder: a second one is refused while the first is alive.

The lock is the kernel's (`flock` on RUN/.lock): it goes with the process, however that ends, and nothing has to be
cleaned up after a crash. Where the file system has no locks, the process that the file names decides, as far as this
machine can tell whether it is alive.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from flux2_relay.cache.errors import InputError

_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the run folder, if need be, and hold it for a training; InputError names who holds it already."""
    with _opened(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD or _is_alive(_holder(file)):
                raise _refusal(folder, _holder(file)) from None
        _write(file, f"{os.getpid()} {socket.gethostname()}\n")
        try:
            yield
        finally:
            _write(file, "")


def _opened(folder: Path) -> TextIO:
    """The lock's file; the folder is made for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{folder}: this run folder cannot be made or written to ({error.strerror}); correct run.dir"
        ) from None


def _refusal(folder: Path, holder: tuple[int, str] | None) -> InputError:
    who = "another process" if holder is None else f"process {holder[0]} on {holder[1]}"
    return InputError(
        f"{folder} is being trained by {who}; wait for it, `touch {folder / '.stop'}` ends it with a checkpoint, or "
        "choose another run.name"
    )


def _holder(file: TextIO) -> tuple[int, str] | None:
    """The process and the machine that the file names."""
    file.seek(0)
    number, _, host = file.read().strip().partition(" ")
    return (int(number), host) if number.isdigit() and host else None


def _is_alive(holder: tuple[int, str] | None) -> bool:
    """Whether the process is known to run; of another machine that cannot be known."""
    if holder is None or holder[1] != socket.gethostname() or holder[0] == os.getpid():
        return False
    try:
        os.kill(holder[0], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write(file: TextIO, text: str) -> None:
    with suppress(OSError):  # on a full disk the lock holds without its note
        file.seek(0)
        file.truncate()
        file.write(text)
        file.flush()
