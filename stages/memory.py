"""How much memory a stage may take: what the device recommends, or what the user says."""

import ctypes
import os
from typing import Literal

import mlx.core as mx

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's mallopt
_SHARE = 0.9  # of what the device recommends: the rest is for buffers that MLX keeps and for the process itself


def budget_bytes(budget: Literal["auto"] | int) -> int:
    """The bytes of arrays that a stage plans with: `memory.budget`, or a margin under what the device recommends."""
    return int(_SHARE * device_bytes()) if budget == "auto" else budget


def device_bytes() -> int:
    """What the device recommends: Metal's working set, a CUDA card's free memory, half of a CPU's RAM."""
    if is_gpu():
        info = mx.device_info()
        return int(info.get("max_recommended_working_set_size") or info.get("free_memory") or _ram() // 2)
    return _ram() // 2


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_cuda() -> bool:
    """Whether MLX computes on an NVIDIA card."""
    return is_gpu() and not mx.metal.is_available()


def is_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return mx.default_device() == mx.Device(mx.gpu)


def keep_freed() -> None:
    """Have the C library keep what is freed, for all threads alike: for blocks that come and go on a CPU.

    Left to itself it gives a large array's pages back and asks for new ones, which the system clears, and each reading
    thread has a heap of its own: a third of the processor's time in a block's reading. glibc only.
    """
    library = ctypes.CDLL(None)
    if is_gpu() or not hasattr(library, "mallopt"):
        return
    for setting, value in ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, 1 << 30), (_ARENA_MAX, 1)):
        library.mallopt(setting, value)
