"""Several runs over one base against as many one after another: `stages.train.many` on random weights."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import steps
from bench.gpu.cases import GIB

from flux2_relay.stages.train import layout, lora, optimizer
from flux2_relay.stages.train.batches import Draw, Item, Loaded
from flux2_relay.stages.train.layout import Load
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.shared_base import shared
from flux2_relay.stages.train.step import Asked, Terms, gradients_together
from flux2_relay.stages.train.transformer import Transformer

Member = tuple[Transformer, optimizer.Optimizer]


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step of all runs together; `ratio` is that over the time of as many steps of one run.

    `in_turns` is the same where the runs share each block's weights alone, and no product.
    """
    bench, count = steps.prepare(settings), settings["runs"]
    warm_up, wanted = settings["warm_up"], settings["steps"]
    try:
        alone = median([bench.step(number) for number in range(warm_up + wanted)][warm_up:])
        base = shared(bench.transformer)
        members = [(replace(base, adapters=bench.transformer.adapters), bench.optimizer)]
        members += [_member(base, bench, seed) for seed in range(1, count)]
        bench.transformer.adapters = {}
        found = {}
        for joins in (False, True):
            for transformer, _ in members:
                transformer.joins = joins
            seconds = [_step(members, bench, number) for number in range(warm_up)]
            mx.reset_peak_memory()
            seconds = [_step(members, bench, warm_up + number) for number in range(wanted)]
            found[joins] = {
                "seconds": steps.short(median(seconds)),
                "all_seconds": [steps.short(value) for value in seconds],
                "predicted_gib": steps.short(_predicted(bench, count, joins) / GIB),
                "peak_gib": steps.short(mx.get_peak_memory() / GIB),
                "ratio": steps.short(median(seconds) / (count * alone)),
            }
        return bench.found | found[True] | {"alone_seconds": steps.short(alone), "in_turns": found[False]}
    finally:
        bench.transformer.residence.close()


def _predicted(bench: steps.Bench, count: int, joins: bool) -> int:
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
    loads = [load] * count
    return layout.predict_together(spec, loads, decided.bits, decided.resident, decided.pieces, joins).peak_bytes


def _member(base: Transformer, bench: steps.Bench, seed: int) -> Member:
    transformer = replace(base, adapters={})
    lora.attach(transformer, LoraOptions(targets="attention"), seed)
    return transformer, optimizer.Optimizer(bench.task.options, lora.parameters(transformer))


def _step(members: Sequence[Member], bench: steps.Bench, number: int) -> float:
    """One step of all runs as `many` does it, each on noise of its own -> its seconds."""
    started, task = time.perf_counter(), bench.task
    item = Item("one", "latents", (task.batch.latents.shape[1], 1), ("caption",))
    loaded = Loaded(number, [([Draw(0, item, "caption")], task.batch)], 0.0)
    asked = [Asked(of, loaded, Terms(seed, task.options, 0.0)) for seed, (of, _) in enumerate(members)]
    found = gradients_together(asked)
    for transformer, update in members:
        clipped, norm = optimizer.clip(found.pop(0)[1], task.options.clip)
        if not bool(mx.isfinite(norm).item()):
            raise RuntimeError(f"step {number}: norm {norm.item()}")
        lora.load(transformer, update.update(lora.parameters(transformer), clipped, number))
    return time.perf_counter() - started
