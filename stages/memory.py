"""How much memory a stage may take: what the device recommends, or what the user says."""

import os
from typing import Literal

import mlx.core as mx

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
