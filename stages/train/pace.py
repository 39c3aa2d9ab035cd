"""How long a step takes on this machine: the steps of a training, on noise instead of a data set.

Gradients, clipping and update are those of `step.py` and `optimizer.py`; only items and, where no model is given, the
weights are random: they are made a block at a time, so that a model needs no more memory than it does in training.
A model that stays in memory at no width is timed in parts: models of a few of its blocks give the time of one block of
each kind and of the rest, and the sum is called computed. Reading blocks from disk is not in it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import blas, quantize
from flux2_relay.stages.device_errors import in_plain_words
from flux2_relay.stages.measure import peak_bytes
from flux2_relay.stages.one_model import release
from flux2_relay.stages.quantize import Weight
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import lora
from flux2_relay.stages.train.batches import Draw, Item, Loaded
from flux2_relay.stages.train.layout import Layout, LayoutOptions, layout_for
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.optimizer import Optimizer, clip
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.residence import Resident, Streamed
from flux2_relay.stages.train.step import Terms, gradients_of
from flux2_relay.stages.train.transformer import Transformer, block_shapes, image_ids, outer_shapes, text_ids

_WARM_UP = 2  # steps in which kernels are compiled and buffers are made
_CACHE_BYTES = 1 << 30  # as in training
_PARTS = (1, 1), (3, 1), (1, 3)
"""Double and single blocks of the models that stand for one which stays in memory at no width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is timed."""

    spec: TransformerSpec
    options: LayoutOptions
    lora: LoraOptions
    size: tuple[int, int]
    """Rows and columns of the picture in tokens."""
    text_rows: int
    steps: int
    """Timed steps, after those that warm up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What was found."""

    layout: Layout
    seconds: float
    """Of the median step."""
    slowest: float
    peak_bytes: int
    """Measured; of a computed pace that of the largest part."""
    computed: bool


Make = Callable[[TransformerSpec, Layout], Transformer]
"""A transformer as a layout has it, without adapters."""


def find(task: Task, make: Make | None, say: Callable[[str], None]) -> Pace:
    """The pace of a task, with the weights that `make` loads, or with random ones.

    InputError where it fits the budget in no way.
    """
    blas.suit(task.spec.hidden)
    mx.set_cache_limit(_CACHE_BYTES)
    if make is not None:
        return _measured(task, _layout(task), make, say)
    in_memory = replace(task.options, memory=replace(task.options.memory, stream="never"))
    try:
        layout = _layout(replace(task, options=in_memory))
    except InputError:
        return _computed(task, say)
    return _measured(task, layout, _random_weights(task), say)


def _random_weights(task: Task) -> Make:
    return partial(random_transformer, dtype=mx.float32 if task.options.train.dtype == "float32" else mx.bfloat16)


def _layout(task: Task) -> Layout:
    item = Item(id="noise", latents="", size=task.size, captions=())
    return layout_for(task.spec, [item], task.text_rows, lora.size(task.spec, task.lora), task.options)


def _measured(task: Task, layout: Layout, make: Make, say: Callable[[str], None]) -> Pace:
    say(layout.in_words())
    release()
    mx.reset_peak_memory()
    with in_plain_words(lambda: "Nothing was changed."):
        transformer = make(task.spec, layout)
        transformer.keep, transformer.attention_heads = layout.keep, layout.heads
        try:
            seconds = _steps(task, transformer, say)
        finally:
            transformer.residence.close()
    peak = peak_bytes()
    del transformer
    release()
    return Pace(layout=layout, seconds=median(seconds), slowest=max(seconds), peak_bytes=peak, computed=False)


def _computed(task: Task, say: Callable[[str], None]) -> Pace:
    """Whole = rest + double blocks x one + single blocks x one, each from the difference of two models."""
    layout = _layout(task)  # what a training would do
    memory = replace(task.options.memory, bits=layout.bits, stream="never")
    part = replace(task, options=replace(task.options, memory=memory))
    found = []
    for double, single in _PARTS:
        few = replace(task.spec, double_blocks=double, single_blocks=single)
        say(f"{double} double and {single} single blocks of {task.spec.double_blocks} and {task.spec.single_blocks}:")
        found.append(_measured(replace(part, spec=few), _layout(replace(part, spec=few)), _random_weights(task), say))
    least, more_double, more_single = found
    a_double = (more_double.seconds - least.seconds) / (_PARTS[1][0] - _PARTS[0][0])
    a_single = (more_single.seconds - least.seconds) / (_PARTS[2][1] - _PARTS[0][1])
    rest = least.seconds - a_double - a_single
    seconds = max(least.seconds, rest + task.spec.double_blocks * a_double + task.spec.single_blocks * a_single)
    spread = max(pace.slowest / pace.seconds for pace in found)
    peak = max(pace.peak_bytes for pace in found)
    return Pace(layout=layout, seconds=seconds, slowest=seconds * spread, peak_bytes=peak, computed=True)


def _steps(task: Task, transformer: Transformer, say: Callable[[str], None]) -> list[float]:
    train = task.options.train
    lora.attach(transformer, task.lora, seed=0)
    optimizer, terms = Optimizer(train, lora.parameters(transformer)), Terms(0, train, task.lora.dropout)
    seconds = []
    for number in range(_WARM_UP + task.steps):
        loaded = _noise(task, number)
        started = time.perf_counter()
        loss, gradients, _ = gradients_of(transformer, loaded, terms)
        gradients, norm = clip(gradients, train.clip)
        if not mx.isfinite(loss + norm).item():
            raise InputError(
                f"step {number + 1} gave loss {loss.item()}: these weights do not compute; see relay check"
            )
        lora.load(transformer, optimizer.update(lora.parameters(transformer), gradients, number))
        seconds.append(time.perf_counter() - started)
        say(f"step {number + 1} of {_WARM_UP + task.steps}: {seconds[-1]:.3g} s{' (warm-up)' * (number < _WARM_UP)}")
    return seconds[_WARM_UP:]


def _noise(task: Task, number: int) -> Loaded:
    """Passes of a step, random where a data set would be."""
    (rows, columns), train = task.size, task.options.train
    item = Item(id="noise", latents="", size=task.size, captions=())
    passes = []
    for turn in range(train.accumulate):
        key = mx.random.key(number * train.accumulate + turn)
        shapes = (
            (train.batch, rows * columns, task.spec.channels),
            (train.batch, task.text_rows, task.spec.context_width),
        )
        latents, context = (mx.random.normal(s, key=k) for s, k in zip(shapes, mx.random.split(key), strict=True))
        batch = Batch(
            latents=latents,
            context=context.astype(mx.bfloat16),
            latent_ids=image_ids(rows, columns),
            text_ids=text_ids(task.text_rows),
        )
        mx.eval(batch.latents, batch.context)
        passes.append(([Draw(turn * train.batch + place, item, "") for place in range(train.batch)], batch))
    return Loaded(number, passes, 0.0)


def random_transformer(spec: TransformerSpec, layout: Layout, dtype: mx.Dtype = mx.float32) -> Transformer:
    """A transformer of this size whose weights keep activations near one; computes in `dtype`."""

    def read(place: int) -> dict[str, Weight]:
        return _random(block_shapes(spec, place), layout.bits, place + 1)

    residence = partial(Streamed, resident=layout.resident, ahead=layout.ahead) if layout.streamed else Resident
    return Transformer(spec, dtype, _random(outer_shapes(spec), layout.bits, 0), residence(spec.blocks, read))


def _random(shapes: dict[str, tuple[int, ...]], bits: int, seed: int) -> dict[str, Weight]:
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    made: dict[str, Weight] = {}
    for (name, shape), key in zip(shapes.items(), keys, strict=True):
        if len(shape) == 2:
            value = mx.random.normal(shape, mx.bfloat16, scale=1 / math.sqrt(shape[1]), key=key)
            made[name] = quantize.pack(value, bits)
        else:
            made[name] = mx.ones(shape, mx.float32 if bits == 32 else mx.bfloat16)
        mx.eval(made[name])  # one matrix at a time: a block in bfloat16 beside its packed form would be the peak
    return made
