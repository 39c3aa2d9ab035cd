"""One rank of `parallel.py`: steps of ours on random weights, gradients averaged by the product's own group."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import parent, steps
from bench.gpu.cases import GIB

from flux2_relay.pipeline import rank, signals
from flux2_relay.stages.train import lora, objective, optimizer
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.ranks import Group


def main() -> None:
    """Run with the settings that the command line carries; print the figures as JSON, last."""
    parent.end_with_parent()
    settings, folder = json.loads(sys.argv[2]), Path(sys.argv[3])
    with rank.taking_part() as group, signals.finish_the_step() as stop:
        bench = steps.prepare({**settings, "pixels": tuple(settings["pixels"])})
        try:
            found = measure(bench, group, settings, folder, stop)
        finally:
            bench.transformer.residence.close()
    print(json.dumps(found), flush=True)


def measure(bench: steps.Bench, group: Group, settings: Mapping[str, Any], folder: Path, stop: Any) -> dict[str, Any]:
    """Warm up, then so many steps -> seconds of the median one, its reduction, the peak; the adapter goes to a file."""
    warm_up, count = settings.get("warm_up", steps.WARM_UP), settings.get("steps", steps.STEPS)
    seconds, reduced = [], []
    for number in range(warm_up + count):
        if number == warm_up:
            mx.reset_peak_memory()
            if settings.get("beat"):
                (folder / "beat").touch()
        started, waited = time.perf_counter(), group.waits.seconds
        step(bench, group, number, settings.get("accumulate", 1))
        seconds.append(time.perf_counter() - started)
        reduced.append(group.waits.seconds - waited)
        if group.any(stop()):
            break
    if group.is_first:
        mx.save_safetensors(str(folder / "adapter.safetensors"), lora.parameters(bench.transformer))
    return {
        "how": bench.layout.in_words(),
        "seconds": steps.short(median(seconds[warm_up:])),
        "all_seconds": [steps.short(value) for value in seconds[warm_up:]],
        "peak_gib": steps.short(mx.get_peak_memory() / GIB),
        "adapter_parameters": bench.found["adapter_parameters"],
        **({} if group.is_alone else {"reduce_seconds": steps.short(median(reduced[warm_up:]))}),
    }


def step(bench: steps.Bench, group: Group, number: int, accumulate: int) -> None:
    """One step as `stages.train` does it: passes dealt by place, sums averaged, one update at every rank."""
    task, transformer = bench.task, bench.transformer
    losses, sums = [], {}
    for place in range(group.rank, accumulate * group.size, group.size):
        sigma, noise = objective.draw(0, number, place, task.batch.latents.shape[1:], task.options)
        loss, gradients = loss_and_gradients(
            transformer, task.batch, mx.array([sigma], mx.float32), noise[None], task.guidance, task.options
        )
        sums = {name: sums[name] + value if sums else value for name, value in gradients.items()}
        mx.eval(loss, sums)
        losses.append(loss)
    means = {name: value / accumulate for name, value in sums.items()} if accumulate > 1 else sums
    loss, means = group.average(mx.mean(mx.stack(losses)), means)
    clipped, norm = optimizer.clip(means, task.options.clip)
    if not bool(mx.isfinite(loss + norm).item()):
        raise RuntimeError(f"step {number}: loss {loss.item()}, norm {norm.item()}")
    lora.load(transformer, bench.optimizer.update(lora.parameters(transformer), clipped, number))
