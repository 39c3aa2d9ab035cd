"""Where a step's seconds go: each piece of the blocks on its own, and what the products with the base alone would take.

Pieces that are waited for one by one take longer in all than a step that runs ahead: the shares tell, not the sum.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import steps

from flux2_relay.stages.train.pieces import Pieces
from flux2_relay.stages.train.transformer import block_shapes

LARGEST = 8
"""Pieces that are named; the others are one sum."""


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step, of its pieces one by one, and of the products; `ratio` is the first over the last."""
    bench = steps.prepare(settings)
    try:
        seconds = [bench.step(number) for number in range(3 + settings.get("steps", 5))][3:]
        usual, timed = bench.transformer.pieces, Timed(bench.transformer.pieces)
        bench.transformer.pieces = timed  # pyright: ignore[reportAttributeAccessIssue]
        bench.step(100)
        bench.transformer.pieces = usual
    finally:
        bench.transformer.residence.close()
    products = product_seconds(bench)
    largest = sorted(timed.seconds.items(), key=lambda item: -item[1])[:LARGEST]
    rest = sum(timed.seconds.values()) - sum(value for _, value in largest)
    told = ", ".join(f"{name} {1000 * value:.0f}" for name, value in [*largest, ("others", rest)])
    return {
        "how": f"products with the base alone {1000 * products:.0f} ms; by piece, in ms: {told}",
        "seconds": steps.short(median(seconds)),
        "ratio": steps.short(median(seconds) / products),
        "products_seconds": steps.short(products),
        "pieces": {name: steps.short(value) for name, value in timed.seconds.items()},
        "calls": dict(timed.calls),
    }


@dataclass(slots=True)
class Timed:
    """Calls pieces as `Pieces` does, each waited for and timed."""

    pieces: Pieces
    seconds: dict[str, float] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def __call__(self, piece: Callable[..., Any], *arguments: Any) -> Any:
        """Run a piece to its end."""
        mx.eval(arguments)
        mx.synchronize()
        started = time.perf_counter()
        result = self.pieces(piece, *arguments)
        mx.eval(result)
        mx.synchronize()
        self.seconds[piece.__name__] = self.seconds.get(piece.__name__, 0.0) + time.perf_counter() - started
        self.calls[piece.__name__] += 1
        return result

    def settle(self) -> None:
        """Nothing is under way."""
        self.pieces.settle()


def product_seconds(bench: steps.Bench) -> float:
    """Of all products with the blocks' matrices in a step: forward, back, and once more where nothing is kept.

    Each shape is measured on its own, dense, at the rows that it has in a step.
    """
    spec, rows, image = bench.transformer.spec, bench.task.rows, bench.task.batch.latents.shape[1]
    kept = bench.layout.keep
    times: Counter[tuple[int, int, int]] = Counter()
    for place in range(spec.blocks):
        passes = 2 if place >= spec.blocks - kept else 3
        for name, shape in block_shapes(spec, place).items():
            if len(shape) == 2:
                is_text = "add" in name or "context" in name
                own = rows if place >= spec.double_blocks else rows - image if is_text else image
                times[(own, *shape)] += passes
    return sum(count * _seconds(*shape) for shape, count in times.items())


def _seconds(rows: int, out: int, width: int) -> float:
    x = mx.random.normal((rows, width)).astype(mx.bfloat16)
    weight = mx.random.normal((out, width)).astype(mx.bfloat16)
    repeats = max(1, min(20, int(1e12 // prod((rows, out, width)))))

    def once() -> float:
        mx.synchronize()
        started = time.perf_counter()
        mx.eval([x @ weight.T for _ in range(repeats)])
        mx.synchronize()
        return (time.perf_counter() - started) / repeats

    mx.eval(x, weight)
    return min(once() for _ in range(4))
