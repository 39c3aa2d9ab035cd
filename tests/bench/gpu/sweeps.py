"""Several runs over one base against as many one after another: `stages.train.many` on random weights."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import steps
from bench.gpu.cases import GIB

from flux2_relay.stages.train import layout, lora, optimizer, step_work
from flux2_relay.stages.train.batches import Draw, Item, Loaded
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.shared_base import shared
from flux2_relay.stages.train.step import Asked, Terms, gradients_together
from flux2_relay.stages.train.step_work import Load
from flux2_relay.stages.train.transformer import Transformer

Member = tuple[Transformer, optimizer.Optimizer]


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step of all runs together; `ratio` is that over the time of as many steps of one run.

    `in_turns` is the same where the runs share each block's weights alone, and no product; `apart` the greatest
    relative difference between the two in a run's loss or gradient's norm.
    """
    bench = steps.prepare(settings)
    warm_up, count = settings["warm_up"], settings["steps"]
    try:
        alone = median([bench.step(number) for number in range(warm_up + count)][warm_up:])
        base = shared(bench.transformer)
        members = [(replace(base, adapters=bench.transformer.adapters), bench.optimizer)]
        members += [_member(base, bench, seed) for seed in range(1, settings["runs"])]
        bench.transformer.adapters = {}
        in_turns = _measure(members, bench, settings, alone)
        expected = _look(members, bench)
        for transformer, _ in members:
            transformer.joins = True
        pairs = zip(_look(members, bench), expected, strict=True)
        apart = max(abs(one / other - 1) for one, other in pairs)
        joined = _measure(members, bench, settings, alone)
        told = {"alone_seconds": steps.short(alone), "in_turns": in_turns, "apart": steps.short(apart)}
        return bench.found | joined | told
    finally:
        bench.transformer.residence.close()


def _measure(
    members: Sequence[Member], bench: steps.Bench, settings: Mapping[str, Any], alone: float
) -> dict[str, Any]:
    """The figures of steps of all runs together, beside `alone` seconds of a step of one."""
    for number in range(settings["warm_up"]):
        _step(members, bench, number)
    mx.reset_peak_memory()
    seconds = [_step(members, bench, settings["warm_up"] + number) for number in range(settings["steps"])]
    return {
        "seconds": steps.short(median(seconds)),
        "all_seconds": [steps.short(value) for value in seconds],
        "predicted_gib": steps.short(_predicted(bench, len(members), members[0][0].joins) / GIB),
        "peak_gib": steps.short(mx.get_peak_memory() / GIB),
        "ratio": steps.short(median(seconds) / (len(members) * alone)),
    }


def _look(members: Sequence[Member], bench: steps.Bench) -> list[float]:
    """Loss and norm of the gradient of each run in a step that changes nothing."""
    found = gradients_together(_asked(members, bench, 0))
    norms = [optimizer.clip(of, bench.task.options.clip)[1] for _, of, _ in found]
    return [value.tolist() for (loss, *_), norm in zip(found, norms, strict=True) for value in (loss, norm)]  # pyright: ignore[reportReturnType] - scalars


def _predicted(bench: steps.Bench, count: int, joins: bool) -> int:
    """Peak bytes of all runs together, by the plan."""
    spec, decided = bench.transformer.spec, bench.layout
    load = Load(
        batch=1,
        rows=bench.task.rows,
        adapter_bytes=4 * bench.found["adapter_parameters"],
        adapter_copies=2 + optimizer.moments(bench.task.options),
        item_bytes=2,
        fused_attention=step_work.has_fused_attention(bench.task.rows),
    )
    loads = [load] * count
    return layout.predict_together(spec, loads, decided.bits, decided.resident, decided.pieces, joins).peak_bytes


def _member(base: Transformer, bench: steps.Bench, seed: int) -> Member:
    transformer = replace(base, adapters={})
    lora.attach(transformer, LoraOptions(targets="attention"), seed)
    return transformer, optimizer.Optimizer(bench.task.options, lora.parameters(transformer))


def _asked(members: Sequence[Member], bench: steps.Bench, number: int) -> list[Asked]:
    """A step of each run on the one picture, each on noise of its own."""
    task = bench.task
    item = Item("one", "latents", (task.batch.latents.shape[1], 1), ("caption",))
    loaded = Loaded(number, [([Draw(0, item, "caption")], task.batch)], 0.0)
    return [Asked(of, loaded, Terms(seed, task.options, 0.0)) for seed, (of, _) in enumerate(members)]


def _step(members: Sequence[Member], bench: steps.Bench, number: int) -> float:
    """One step of all runs as `many` does it -> its seconds."""
    started, options = time.perf_counter(), bench.task.options
    found = gradients_together(_asked(members, bench, number))
    for transformer, update in members:
        clipped, norm = optimizer.clip(found.pop(0)[1], options.clip)
        if not bool(mx.isfinite(norm).item()):
            raise RuntimeError(f"step {number}: norm {norm.item()}")
        lora.load(transformer, update.update(lora.parameters(transformer), clipped, number))
    return time.perf_counter() - started
