"""Training steps of ours: the layout, the residence, the blocks, the optimizer of stage two, on random weights.

What a case does not say is decided as a run decides it. The reading of blocks from disk is the product's own: the files
that `memory.copy` would keep are laid ready under the names that it looks for.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import models
from bench.gpu.cases import ALL, GIB
from bench.gpu.random_weights import RandomTensors, name_as_identity

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import kernels
from flux2_relay.stages.quantize import QUANTIZED_BITS
from flux2_relay.stages.sizes import TransformerSpec
from flux2_relay.stages.train import layout, loop, lora, optimizer, packed_copy, step_work
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.layout import Layout
from flux2_relay.stages.train.options import LoraOptions, MemoryOptions
from flux2_relay.stages.train.residence import BlockWeights, Reader, Residence, Resident, Streamed, resident_places
from flux2_relay.stages.train.step_work import Load
from flux2_relay.stages.train.transformer import Transformer, block_path, block_shapes, from_tensors, tensor_shapes

WARM_UP, STEPS = 3, 8


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure -> the figures of one case."""
    bench = prepare(settings)
    try:
        warm_up = [bench.step(n) for n in range(settings.get("warm_up", WARM_UP))]
        bench.found["first_seconds"] = short(warm_up[0])
        if bench.layout.streamed:
            bench.reading()
            bench.step(len(warm_up))
        mx.reset_peak_memory()
        return bench.found | bench.measure(settings.get("steps", STEPS))
    finally:
        bench.transformer.residence.close()


def prepare(settings: Mapping[str, Any]) -> "Bench":
    """The model as the case or the plan wants it, with a fresh adapter."""
    is_tiny, kernels.portable = settings.get("tiny", False), settings.get("portable", False)
    spec = models.transformer_spec(settings["model"], is_tiny)
    task = models.task(spec, settings["pixels"], is_tiny)
    options = LoraOptions(targets=settings.get("targets", "attention"))
    load = Load(
        batch=1,
        rows=task.rows,
        adapter_bytes=4 * lora.size(spec, options),
        adapter_copies=2 + optimizer.moments(task.options),
        item_bytes=2,
        fused_attention=step_work.has_fused_attention(task.rows),
    )
    decided = decide(spec, load, settings)
    mx.set_cache_limit(settings["cache_gib"] * GIB if "cache_gib" in settings else loop._CACHE_BYTES)
    started = time.perf_counter()
    transformer = load_random(spec, decided, settings.get("files"))
    mx.synchronize()
    found = {
        "load_seconds": short(time.perf_counter() - started),
        "layout": decided.in_words(),
        "predicted_gib": short(decided.peak_bytes / GIB),
        "resident": decided.resident,
        "keep": decided.keep,
        "bits": decided.bits,
        "rows": task.rows,
    }
    pieces = settings.get("ahead", getattr(decided, "pieces", None))  # None is the device's usual number
    transformer.pieces.ahead = transformer.pieces.ahead if pieces is None else pieces
    lora.attach(transformer, options, seed=0)
    found["adapter_parameters"] = sum(value.size for value in lora.parameters(transformer).values())
    return Bench(transformer, task, decided, optimizer.Optimizer(task.options, lora.parameters(transformer)), found)


def decide(spec: TransformerSpec, load: Load, settings: Mapping[str, Any]) -> Layout:
    """The layout that the case spells out, or that the plan chooses for its budget."""
    if "budget_gib" not in settings:
        resident, keep = (spec.blocks if settings.get(name, ALL) == ALL else settings[name] for name in WHERE)
        return layout.predict(spec, load, settings["bits"], resident, keep)
    budget = settings["budget_gib"] * GIB
    if settings.get("tiny"):  # as far between the least and the most that this model can take
        least, most = (
            layout.predict(spec, load, *what).peak_bytes for what in ((4, 0), (16, spec.blocks, spec.blocks))
        )
        budget = int(1.02 * (least + (most - least) * settings["budget_gib"] / 80))
    try:
        return layout.choose(spec, load, MemoryOptions(), budget)
    except InputError:  # not even 8 bit fits
        return layout.choose(spec, load, MemoryOptions(bits=4), budget)


WHERE = "resident", "keep"


def load_random(spec: TransformerSpec, decided: Layout, files: str | None) -> Transformer:
    """The transformer as stage two loads it; what is streamed lies in the folder `files`."""
    tensors: Any = RandomTensors(tensor_shapes(spec))
    residence = partial(Streamed, resident=decided.resident, ahead=decided.ahead) if decided.streamed else Resident
    copy = Path(files) if files and decided.streamed else None
    if decided.streamed and decided.bits not in QUANTIZED_BITS:
        raise RuntimeError(
            f"not measured, as random weights at {decided.bits} bit are not on disk: {decided.in_words()}"
        )
    if copy is not None:
        setattr(packed_copy.identity, "weights_identity", name_as_identity)  # noqa: B010 - for this process alone
        lay_ready(tensors, spec, decided.bits, copy)
    transformer = from_tensors(tensors, spec, decided.bits, mx.bfloat16, residence, copy)
    transformer.keep, transformer.attention_heads = decided.keep, decided.heads
    return transformer


def lay_ready(tensors: Any, spec: TransformerSpec, bits: int, folder: Path) -> None:
    """The files of `memory.copy`, without the reading back and syncing that a real one is written with."""
    folder.mkdir(parents=True, exist_ok=True)

    def hold(blocks: int, read: Reader) -> Resident:
        for place in range(blocks):
            names = [f"{block_path(spec, place)}.{name}.weight" for name in block_shapes(spec, place)]
            file = folder / f"{name_as_identity(tensors, names, {'bits': bits})}.safetensors"
            if not file.exists():
                mx.save_safetensors(str(file), packed_copy._flat(read(place)))
                mx.clear_cache()
        return Resident(0, read)

    from_tensors(tensors, spec, bits, mx.bfloat16, hold)


@dataclass(frozen=True, slots=True)
class Bench:
    """A loaded model and its task."""

    transformer: Transformer
    task: models.Task
    layout: Layout
    optimizer: optimizer.Optimizer
    found: dict[str, Any]

    def step(self, number: int) -> float:
        """One step as `stages.train.running` does it -> its seconds."""
        started = time.perf_counter()
        sigma, noise = self.task.draw(number)
        loss, gradients = loss_and_gradients(
            self.transformer, self.task.batch, sigma, noise, self.task.guidance, self.task.options
        )
        mx.eval(loss, gradients)
        clipped, norm = optimizer.clip(gradients, self.task.options.clip)
        if not bool(mx.isfinite(loss + norm).item()):
            raise RuntimeError(f"step {number}: loss {loss.item()}, norm {norm.item()}")
        lora.load(self.transformer, self.optimizer.update(lora.parameters(self.transformer), clipped, number))
        self.found.update(loss=loss.item(), norm=norm.item())
        return time.perf_counter() - started

    def measure(self, steps: int) -> dict[str, Any]:
        """Median and all of `steps` steps, the peak of arrays, and what is in memory between steps."""
        seconds = [self.step(100 + number) for number in range(steps)]
        found: dict[str, Any] = {
            "seconds": short(median(seconds)),
            "all_seconds": [short(value) for value in seconds],
            "peak_gib": short(mx.get_peak_memory() / GIB),
            "active_gib": short(mx.get_active_memory() / GIB),
            "cache_gib": short(mx.get_cache_memory() / GIB),
            "loss": self.found["loss"],
            "norm": self.found["norm"],
        }
        if "loader_seconds" in self.found:
            slower = max(self.found["loader_seconds"], self.found["compute_seconds"])
            found["ratio"] = short(median(seconds) / slower)
        return found

    def reading(self) -> None:
        """Note what a pass forward and back takes in reading alone, and in computing alone.

        Computing alone is a step in which one double and one single block stand for all: the same products.
        """
        residence, spec = self.transformer.residence, self.transformer.spec
        order = [*range(spec.blocks), *reversed(range(spec.blocks))]
        started = time.perf_counter()
        residence.announce(order)
        for place in order:
            residence.weights(place)
        mx.synchronize()
        seconds = time.perf_counter() - started
        held = resident_places(spec.blocks, self.layout.resident)
        streamed = [step_work.block_bytes(spec, p, self.layout.bits) for p in range(spec.blocks) if p not in held]
        read = 2 * sum(streamed) - streamed[-1]  # the block at the turn is read once
        self.transformer.residence = Same(residence, spec)
        compute = [self.step(number) for number in range(3)][-1]
        self.transformer.residence = residence
        self.found.update(loader_seconds=short(seconds), loader_gib_s=short(read / GIB / seconds))
        self.found.update(compute_seconds=short(compute))


def short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


class Same:
    """A residence where one double and one single block stand for all."""

    def __init__(self, residence: Residence, spec: TransformerSpec) -> None:
        """Take the two from `residence`."""
        residence.announce([0, spec.blocks - 1])
        self._doubles = spec.double_blocks
        self._double, self._single = residence.weights(0), residence.weights(spec.blocks - 1)

    def announce(self, order: Sequence[int]) -> None:
        """Nothing to prepare."""

    def weights(self, place: int) -> BlockWeights:
        """Those of its kind."""
        return self._double if place < self._doubles else self._single

    def close(self) -> None:
        """Nothing is being read."""
