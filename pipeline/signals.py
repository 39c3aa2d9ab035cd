"""Ctrl-C and SIGTERM: work is committed, then the process leaves with the status that shells expect.

Stage one commits entry by entry, so there the signal may stop it anywhere. Stage two finishes its step and writes a
checkpoint; a second signal does not wait for that.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM or SIGINT arrived; like KeyboardInterrupt no `except Exception` swallows it."""

    def __init__(self, exit_status: int) -> None:
        """Leave with `exit_status`."""
        super().__init__(exit_status)
        self.exit_status = exit_status


def listen() -> None:
    """Make SIGTERM an exception, so that open files and queues are left in order."""
    signal.signal(signal.SIGTERM, _raise)


@contextmanager
def end_it() -> Iterator[Callable[[], int]]:
    """Make SIGTERM a KeyboardInterrupt as Ctrl-C is one; give a function that says the exit status of the last."""
    received = [signal.SIGINT]

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: 128 + received[-1]
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def finish_the_step() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether a signal has come; on leaving the block that signal's exit follows."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            _raise(number, frame)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Terminated(128 + received[0])


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated(128 + number)
