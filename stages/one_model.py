"""One model at a time: a stage's turn with a model, from loading it to having its memory back."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from flux2_relay.stages import measure

Result = TypeVar("Result")

_held: list[str] = []


@dataclass(frozen=True, slots=True)
class Turn:
    """One model's turn that is over."""

    name: str
    seconds: float
    before_bytes: int  # of arrays, as the two that follow
    peak_bytes: int
    after_bytes: int
    process_bytes: int  # of the process, once the model was released
    predicted_bytes: int | None


turns: list[Turn] = []
"""Every turn of this process so far, for what a stage says at its end."""


def in_turn(
    name: str,
    work: Callable[[], Result],
    say: Callable[[str], None],
    predicted_bytes: int | None = None,
    predicted_seconds: float | None = None,
) -> Result:
    """Run `work`, which loads the model `name` and lets go of it when it returns; say what memory that took.

    The peak and the time that were predicted are told beside those measured.
    Peak memory is the larger model, never the sum: a second model while one is held is a mistake of ours.
    """
    if _held:
        raise RuntimeError(f"{name} was to be loaded while {_held[-1]} is still held")
    before, started = mx.get_active_memory(), time.perf_counter()
    mx.reset_peak_memory()
    _held.append(name)
    try:
        return work()
    finally:
        _held.clear()
        peak = mx.get_peak_memory()
        planned = "" if predicted_bytes is None else f" (predicted {measure.in_words(predicted_bytes)})"
        of_time = "" if predicted_seconds is None else f" (predicted {predicted_seconds:.1f} s)"
        release()
        seconds, after, process = time.perf_counter() - started, mx.get_active_memory(), measure.resident_bytes()
        turns.append(Turn(name, seconds, before, peak, after, process, predicted_bytes))
        say(
            f"{name} released after {seconds:.1f} s{of_time}; arrays: "
            f"{measure.in_words(before)} before, {measure.in_words(peak)} at the peak{planned}, "
            f"{measure.in_words(after)} now; process: {measure.in_words(process)} now"
        )


def say_loaded(what: str, say: Callable[[str], None]) -> None:
    """Tell what stands in memory once a model is loaded."""
    say(f"{what} loaded; arrays: {measure.in_words(mx.get_active_memory())}")


def release() -> None:
    """Give back what nobody refers to any more: a lazy result or a compiled function would hold its inputs."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps what was freed in pieces below 32 MB until it is asked
        trim(0)
