"""What a failing GPU says, in plain words.

MLX raises RuntimeError at the next evaluation with the driver's text in it. Whatever was computed since the last good
one is suspect then: the process leaves, and the next start goes on from a checkpoint.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flux2_relay.cache.errors import RelayError

_MEMORY = (
    "the device has no memory left",
    "set a smaller memory.budget, fewer memory.bits, a smaller train.batch or smaller data.resolutions, "
    "or end other programs that use the GPU",
)
_DISPLAY = (
    "macOS stopped the GPU's work because it held up the display (the watchdog)",
    "let the display sleep while it trains (`pmset displaysleepnow` under `caffeinate -s`), or start over ssh; "
    "fewer other programs on the GPU and smaller data.resolutions help, too",
)
_TIMEOUT = (
    "the GPU waited too long for something else and was stopped",
    "end other programs that use the GPU or the processor heavily",
)
_BUFFERS = (
    "more buffers than the system allows are in use",
    "use fewer data.resolutions, so that there are fewer shapes",
)
_LOST = (
    "the GPU or its driver failed",
    "if it happens again, restart the machine and look for a newer driver or system",
)

# In this order: the first whose text occurs wins.
_TEXTS: tuple[tuple[str, tuple[str, str]], ...] = (
    ("impacting interactivity", _DISPLAY),
    ("0000000e", _DISPLAY),
    ("outofmemory", _MEMORY),
    ("out of memory", _MEMORY),
    ("insufficient memory", _MEMORY),
    ("unable to allocate", _MEMORY),
    ("maximum allowed buffer size", _MEMORY),
    ("bad_alloc", _MEMORY),
    ("memoryallocation", _MEMORY),
    ("resource limit", _BUFFERS),
    ("gpu timeout", _TIMEOUT),
    ("00000002", _TIMEOUT),
    ("[metal]", _LOST),
    ("command buffer", _LOST),
    ("cuda error", _LOST),
    ("cudaerror", _LOST),
)


def explain(error: BaseException) -> tuple[str, str] | None:
    """What happened and what to do, for an error of the device; None for any other."""
    text = str(error).lower()
    if isinstance(error, MemoryError):
        return _MEMORY
    return next((words for sign, words in _TEXTS if sign in text), None)


@contextmanager
def in_plain_words(where_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Errors of the device inside the block become a RelayError that ends with the sentence `where_to_go_on`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = explain(error)
        if words is None:
            raise
        happened, remedy = words
        raise RelayError(f"{happened} ({str(error).strip()}). What to do: {remedy}. {where_to_go_on()}") from error
