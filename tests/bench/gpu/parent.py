"""No process outlives the one that started it: a case that runs out of time is killed without warning."""

import ctypes
import os
import signal
import sys
import threading
import time

_VARIABLE = "RELAY_BENCH_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def named() -> dict[str, str]:
    """What the environment of a child has to hold."""
    return {_VARIABLE: str(os.getpid())}


def end_with_parent() -> None:
    """Be killed when the process that started this one is gone, were it gone already."""
    parent = int(os.environ[_VARIABLE])
    if sys.platform == "linux":  # by the kernel: no thread of ours runs where a call that blocks holds Python's lock
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=[parent], daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
