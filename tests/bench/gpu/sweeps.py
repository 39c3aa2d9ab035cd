"""Several runs over one base against as many one after another: `stages.train.many` on random weights."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import steps
from bench.gpu.cases import GIB

from flux2_relay.stages.train import layout, lora, optimizer, turns
from flux2_relay.stages.train.backprop import in_turns
from flux2_relay.stages.train.layout import Load
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.shared_base import shared
from flux2_relay.stages.train.transformer import Transformer

Member = tuple[Transformer, optimizer.Optimizer]


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step of all runs together; `ratio` is that over the time of as many steps of one run."""
    bench, count = steps.prepare(settings), settings["runs"]
    try:
        alone = [bench.step(number) for number in range(settings["warm_up"] + settings["steps"])][settings["warm_up"] :]
        base = shared(bench.transformer)
        members = [(replace(base, adapters=bench.transformer.adapters), bench.optimizer)]
        members += [_member(base, bench, seed) for seed in range(1, count)]
        bench.transformer.adapters = {}
        for number in range(settings["warm_up"]):
            _step(members, bench, 100 + number)
        mx.reset_peak_memory()
        together = [_step(members, bench, 200 + number) for number in range(settings["steps"])]
        return bench.found | {
            "seconds": steps.short(median(together)),
            "predicted_gib": steps.short(_predicted(bench, count) / GIB),
            "alone_seconds": steps.short(median(alone)),
            "all_seconds": [steps.short(value) for value in together],
            "peak_gib": steps.short(mx.get_peak_memory() / GIB),
            "ratio": steps.short(median(together) / (count * median(alone))),
        }
    finally:
        bench.transformer.residence.close()


def _predicted(bench: steps.Bench, count: int) -> int:
    """Peak bytes of all runs together, by the plan."""
    spec, decided = bench.transformer.spec, bench.layout
    load = Load(
        batch=1,
        rows=bench.task.rows,
        adapter_bytes=4 * bench.found["adapter_parameters"],
        adapter_copies=2 + optimizer.moments(bench.task.options),
        item_bytes=2,
        fused_attention=layout.has_fused_attention(bench.task.rows),
    )
    return layout.predict_together(spec, [load] * count, decided.bits, decided.resident, decided.pieces).peak_bytes


def _member(base: Transformer, bench: steps.Bench, seed: int) -> Member:
    transformer = replace(base, adapters={})
    lora.attach(transformer, LoraOptions(targets="attention"), seed)
    return transformer, optimizer.Optimizer(bench.task.options, lora.parameters(transformer))


def _step(members: Sequence[Member], bench: steps.Bench, number: int) -> float:
    """One step of all runs as `many` does it, each on noise of its own -> its seconds."""
    started, task = time.perf_counter(), bench.task
    draws = [task.draw(number + 1000 * place) for place in range(len(members))]
    ways = [
        in_turns(transformer, task.batch, sigma, noise, task.guidance, task.options)
        for (transformer, _), (sigma, noise) in zip(members, draws, strict=True)
    ]
    found = turns.together(ways)
    mx.eval(found)
    for transformer, update in members:
        clipped, norm = optimizer.clip(found.pop(0)[1], task.options.clip)
        if not bool(mx.isfinite(norm).item()):
            raise RuntimeError(f"step {number}: norm {norm.item()}")
        lora.load(transformer, update.update(lora.parameters(transformer), clipped, number))
    return time.perf_counter() - started
