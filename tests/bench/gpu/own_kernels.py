"""What `stages/kernels.py` holds: equal to the portable form on this device, and how much faster."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import mlx.core as mx

from flux2_relay.stages import kernels, memory

HIDDEN, TINY_HIDDEN, ROWS = 6144, 64, 4481
"""Width of dev; rows of attention that no 128 divides."""


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each with our kernel and without; `ratio` is 1 where all results are equal, else 2."""
    width = TINY_HIDDEN if settings.get("tiny") else HIDDEN
    said, equal = [], []
    for bits in (4, 8):
        packed = mx.quantize(mx.random.normal((9 * width, width)).astype(mx.bfloat16), group_size=64, bits=bits)

        def unpack(packed: Any = packed, bits: int = bits) -> mx.array:
            return kernels.unpack(*packed, group=64, bits=bits)

        (own, fast), (portable, slow) = both(unpack)
        equal.append(bool(mx.array_equal(own, portable).item()))
        said.append(f"unpacking {bits} bit {1000 * fast:.3f} ms, portable {1000 * slow:.3f}")
    rows, heads = (33, 2) if settings.get("tiny") else (ROWS, 48)
    qkv = [mx.random.normal((1, heads, rows, 128), key=mx.random.key(n)).astype(mx.bfloat16) for n in range(4)]

    def attend() -> list[mx.array]:
        out, pulled = mx.vjp(lambda *x: [kernels.attention(*x)], qkv[:3], qkv[3:])
        return [*out, *pulled]

    (own, fast), (portable, slow) = both(attend)
    equal.append(all(far(a, b) < 0.02 for a, b in zip(own, portable, strict=True)))
    said.append(f"attention of {rows} rows, forward and back, {1000 * fast:.2f} ms, portable {1000 * slow:.2f}")
    where = "with our kernels" if memory.is_cuda() else "none of our kernels on this backend"
    return {"how": f"{where}: {'; '.join(said)}", "ratio": 1.0 if all(equal) else 2.0, "equal": equal}


def both(call: Callable[[], Any]) -> list[tuple[Any, float]]:
    """What `call` gives and the seconds that it takes, with our kernels and without."""
    found = []
    for kernels.portable in (False, True):
        seconds, result = [], None
        for _ in range(12):
            mx.synchronize()
            started = time.perf_counter()
            result = call()
            mx.eval(result)
            mx.synchronize()
            seconds.append(time.perf_counter() - started)
        found.append((result, median(seconds[2:])))
    kernels.portable = False
    return found


def far(a: mx.array, b: mx.array) -> float:
    """Relative L2 distance of two arrays in bfloat16: some 0.005 where both are right."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.linalg.norm((a - b).reshape(-1)) / mx.linalg.norm(b.reshape(-1)))  # pyright: ignore
