"""What memory a stage takes, as the operating system and MLX count it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx


def peak_bytes() -> int:
    """The most bytes of live arrays that MLX has held since the start of the process or the last reset."""
    return mx.get_peak_memory()


def peak_resident_bytes() -> int:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` would also count what the process was before it became this program
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def resident_bytes() -> int:
    """The resident size of this process now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    listed = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=False)
    return int(listed.stdout or 0) * 1024


def in_words(size: float) -> str:
    """Bytes as people read them: 3 significant digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError
