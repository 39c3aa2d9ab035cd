"""One rank of a training that several processes do together: what it says, and how it ends.

Each names itself when it begins and says its exit status when it ends: whoever started them (`launch.py`) knows by that
line, as `mlx.launch` itself keeps the statuses of its processes to itself.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flux2_relay.cache.errors import RelayError
from flux2_relay.pipeline import signals

if TYPE_CHECKING:
    from flux2_relay.stages.train.ranks import Group, Waits

ENDED = re.compile(r"rank (\d+) of (\d+) ended with status (\d+)")
"""Rank, size of its group, and exit status: the last line of every rank that could still speak."""
PATIENCE = 20
"""Seconds that a rank which was told to leave waits for the others; a backend may wait for a lost one for ever."""


class Silent:
    """The journal of a rank that is not the first: the same steps are told by that one."""

    def write(self, line: Mapping[str, object]) -> None:
        """Nothing."""

    def write_validation(self, line: Mapping[str, object]) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""


@contextmanager
def taking_part() -> "Iterator[Group]":
    """The group that this process was started in, for as long as it trains; a process alone says nothing of it."""
    from flux2_relay.stages.train import ranks

    waits, opened = ranks.Waits(), []
    if ranks.launched_with(os.environ):
        _watch(waits, opened)
    group = ranks.open_group(waits)
    if group.is_alone:
        yield group
        return
    opened.append(group)
    _tell(f"rank {group.rank} of {group.size} is process {os.getpid()} on {socket.gethostname()}")
    try:
        yield group
    except BaseException as error:
        _end(group, _status_of(error))
        raise
    _end(group, 0)


def _status_of(error: BaseException) -> int:
    if isinstance(error, RelayError | signals.Terminated):
        return error.exit_status
    return signals.INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _end(group: "Group", status: int) -> None:
    _tell(f"rank {group.rank} of {group.size} ended with status {status}")


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")  # at once, so that lines of several ranks do not run into each other
    sys.stdout.flush()


def _watch(waits: "Waits", opened: "Sequence[Group]") -> None:
    """From the first signal on, see that this process does not wait for lost ranks for ever.

    A process that waits inside a backend runs no Python handler, but the signal's number still reaches a socket.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_leave_if_stuck, args=(heard, waits, opened), name="patience", daemon=True).start()


def _leave_if_stuck(heard: socket.socket, waits: "Waits", opened: "Sequence[Group]") -> None:
    """`opened` holds the group once there is one: not yet, where another rank never came."""
    number = heard.recv(1)[0]
    told = time.monotonic()
    while True:
        since = waits.since
        if since is not None and time.monotonic() - max(since, told) > PATIENCE:
            _tell(f"this rank was told to leave and has waited {PATIENCE} s for the others; it leaves now")
            for group in opened:
                _end(group, 128 + number)
            os._exit(128 + number)
        time.sleep(1)
