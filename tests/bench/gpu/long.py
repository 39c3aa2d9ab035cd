"""Many steps in a row: whether memory or the time of a step grows."""

from collections.abc import Mapping
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import steps
from bench.gpu.cases import GIB

WINDOWS = 7
"""Parts of the run that are compared; the first and the last decide."""


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds, peak and active memory of each part; `ratio` is the greatest growth of a median over the first part."""
    bench = steps.prepare(settings)
    for number in range(settings["warm_up"]):
        bench.step(number)
    parts, each = [], max(1, settings["steps"] // WINDOWS)
    for part in range(settings["steps"] // each):
        mx.reset_peak_memory()
        seconds = [bench.step(settings["warm_up"] + part * each + number) for number in range(each)]
        parts.append((median(seconds), mx.get_peak_memory(), mx.get_active_memory()))
    times, peaks, active = zip(*parts, strict=True)
    return bench.found | {
        "seconds": steps.short(median(times)),
        "peak_gib": steps.short(max(peaks) / GIB),
        "part_seconds": [steps.short(value) for value in times],
        "part_peak_gib": [steps.short(value / GIB) for value in peaks],
        "part_active_gib": [steps.short(value / GIB) for value in active],
        "memory_growth": steps.short(max(peaks[-1] / peaks[0], active[-1] / active[0])),
        "ratio": steps.short(times[-1] / times[0]),
    }
