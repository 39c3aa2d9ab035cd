"""How long a step takes on this machine: the steps of a training, on noise instead of a data set.

Gradients, clipping and update are those of `step.py` and `optimizer.py`; only items and, where no model is given, the
weights are random: they are made a block at a time, so that a model needs no more memory than it does in training.
A model that stays in memory at no width, or whose steps would take too long, is timed in parts: models of a few of its
blocks give the time of one block of each kind and of the rest, and the sum is called computed. Reading blocks from disk
is not in it.

How long all of it will take is told before it begins: the operations of a step over those that one product of the
model's width reaches in a second. Ctrl-C ends it with what was timed so far.
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
from flux2_relay.stages.train.transformer import (
    Transformer,
    block_shapes,
    double_shapes,
    image_ids,
    outer_shapes,
    single_shapes,
    text_ids,
)

_WARM_UP = 2  # steps in which kernels are compiled and buffers are made; one where steps are long
_STEPS, _FEWEST = 5, 2  # timed ones, where nobody says how many
_LONG_SECONDS = 300.0  # from here on fewer steps are timed, then only parts of the model
_PROBE_ROWS, _PROBES, _PROBE_SECONDS = 512, 8, 2.0
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
    steps: int | None = None
    """Timed steps, after those that warm up; None: five, or fewer where these would take long."""


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
    timed: int
    """Steps behind the median, of each part; 0 where only steps that warm up were over."""
    stopped: bool = False
    """Ctrl-C came before the last step."""
    scaled: bool = False
    """Not all parts were timed: by operations from the largest that was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Course:
    """How many steps are made of a model or of each part, and how long a step of the whole should take."""

    warm_up: int
    steps: int
    seconds: float
    in_parts: bool


Make = Callable[[TransformerSpec, Layout], Transformer]
"""A transformer as a layout has it, without adapters."""


def find(task: Task, make: Make | None, say: Callable[[str], None]) -> Pace:
    """The pace of a task, with the weights that `make` loads, or with random ones.

    InputError where it fits the budget in no way; KeyboardInterrupt where it came before the first step was over.
    """
    blas.suit(task.spec.hidden)
    mx.set_cache_limit(_CACHE_BYTES)
    if make is not None:
        layout, in_parts = _layout(task), False
    else:
        layout = _in_memory(task)
        in_parts = layout is None
    course = _course(task, in_parts, make is None)
    say(_announced(task, course))
    if course.in_parts or layout is None:
        return _computed(task, course, say)
    return _measured(task, layout, make or _random_weights(task), course, say)


def _in_memory(task: Task) -> Layout | None:
    """The layout with all blocks in memory, at whatever width it takes."""
    stays = replace(task.options, memory=replace(task.options.memory, stream="never"))
    try:
        return _layout(replace(task, options=stays))
    except InputError:
        return None


def _course(task: Task, in_parts: bool, may_part: bool) -> _Course:
    """As many steps as were asked for; where none were, as many as keep it short, then parts of the model."""
    seconds = _operations(task, task.spec) / _operations_a_second(task)

    def course(warm_up: int, steps: int, in_parts: bool) -> _Course:
        return _Course(warm_up=warm_up, steps=task.steps or steps, seconds=seconds, in_parts=in_parts)

    asked = [course(_WARM_UP, _STEPS, in_parts), course(1, _FEWEST, in_parts)]
    asked += [course(1, _FEWEST, True)] if may_part and not in_parts else []
    return next((one for one in asked if _seconds(task, one) < _LONG_SECONDS), asked[-1])


def _seconds(task: Task, course: _Course) -> float:
    """What all of it should take, making weights aside."""
    of_whole = _operations(task, task.spec)
    share = sum(_operations(task, few) for few in _few(task)) / of_whole if course.in_parts else 1.0
    return (course.warm_up + course.steps) * course.seconds * share


def _few(task: Task) -> list[TransformerSpec]:
    return [replace(task.spec, double_blocks=double, single_blocks=single) for double, single in _PARTS]


def _operations(task: Task, spec: TransformerSpec) -> float:
    """Of a step: two for each weight of the blocks and token that meets it, and attention's.

    Three times those of a forward pass: the pass itself, the one that recomputes, and the gradients of the inputs.
    """
    (rows, columns), train = task.size, task.options.train
    tokens = rows * columns + task.text_rows
    double, single = (sum(map(math.prod, shapes(spec).values())) for shapes in (double_shapes, single_shapes))
    weights = spec.double_blocks * double / 2 + spec.single_blocks * single  # a double block has a half for each stream
    forward = 2 * weights * tokens + 4 * spec.blocks * spec.hidden * tokens**2
    return 3.0 * forward * train.batch * train.accumulate


def _operations_a_second(task: Task) -> float:
    """What a product of the model's width reaches here: the best of a few, since other programs may be in the way."""
    dtype = mx.float32 if task.options.train.dtype == "float32" else mx.bfloat16
    width = task.spec.hidden
    a, b = mx.zeros((_PROBE_ROWS, width), dtype), mx.zeros((width, width), dtype)
    mx.eval(a, b)
    best, began = math.inf, time.perf_counter()
    for number in range(_PROBES):
        started = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - started)
        if number and time.perf_counter() - began > _PROBE_SECONDS:
            break
    return 2.0 * _PROBE_ROWS * width * width / best


def _announced(task: Task, course: _Course) -> str:
    what = f"{course.warm_up + course.steps} steps"
    if course.in_parts:
        what += f" of each of {len(_PARTS)} models of a few of the {task.spec.blocks} blocks"
    return (
        f"{what}, {_about(_seconds(task, course))}: by the speed of one product a step of "
        f"the whole model takes {_about(course.seconds)}. Ctrl-C ends it with what was timed"
    )


def _about(seconds: float) -> str:
    """A forecast, no finer than it deserves."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _random_weights(task: Task) -> Make:
    return partial(random_transformer, dtype=mx.float32 if task.options.train.dtype == "float32" else mx.bfloat16)


def _layout(task: Task) -> Layout:
    item = Item(id="noise", latents="", size=task.size, captions=())
    return layout_for(task.spec, [item], task.text_rows, lora.size(task.spec, task.lora), task.options)


def _measured(task: Task, layout: Layout, make: Make, course: _Course, say: Callable[[str], None]) -> Pace:
    say(layout.in_words())
    release()
    mx.reset_peak_memory()
    seconds: list[float] = []
    stopped = False
    with in_plain_words(lambda: "Nothing was changed."):
        transformer = make(task.spec, layout)
        transformer.keep, transformer.attention_heads = layout.keep, layout.heads
        try:
            _steps(task, transformer, course, seconds, say)
        except KeyboardInterrupt:
            if not seconds:
                raise
            stopped = True
        finally:
            transformer.residence.close()
    peak, timed = peak_bytes(), seconds[course.warm_up :]
    del transformer
    release()
    told = timed or seconds
    return Pace(
        layout=layout,
        seconds=median(told),
        slowest=max(told),
        peak_bytes=peak,
        computed=False,
        timed=len(timed),
        stopped=stopped,
    )


def _computed(task: Task, course: _Course, say: Callable[[str], None]) -> Pace:
    """Whole = rest + double blocks x one + single blocks x one, each from the difference of two models."""
    layout = _layout(task)  # what a training would do
    memory = replace(task.options.memory, bits=layout.bits, stream="never")
    part = replace(task, options=replace(task.options, memory=memory))
    found: list[Pace] = []
    for few in _few(task):
        blocks = f"{few.double_blocks} double and {few.single_blocks} single blocks"
        say(f"{blocks} of {task.spec.double_blocks} and {task.spec.single_blocks}:")
        of_part = replace(part, spec=few)
        try:
            found.append(_measured(of_part, _layout(of_part), _random_weights(task), course, say))
        except KeyboardInterrupt:
            if not found:
                raise
            break
        if found[-1].stopped:
            break
    scaled = len(found) < len(_PARTS)
    seconds = _by_operations(task, found) if scaled else _by_blocks(task, found)
    return Pace(
        layout=layout,
        seconds=seconds,
        slowest=seconds * max(pace.slowest / pace.seconds for pace in found),
        peak_bytes=max(pace.peak_bytes for pace in found),
        computed=True,
        timed=min(pace.timed for pace in found),
        stopped=scaled or found[-1].stopped,
        scaled=scaled,
    )


def _by_blocks(task: Task, found: list[Pace]) -> float:
    least, more_double, more_single = found
    a_double = (more_double.seconds - least.seconds) / (_PARTS[1][0] - _PARTS[0][0])
    a_single = (more_single.seconds - least.seconds) / (_PARTS[2][1] - _PARTS[0][1])
    rest = least.seconds - a_double - a_single
    return max(least.seconds, rest + task.spec.double_blocks * a_double + task.spec.single_blocks * a_single)


def _by_operations(task: Task, found: list[Pace]) -> float:
    """Where the parts do not tell the kinds of block apart yet: as if every operation took as long as every other."""
    done = _few(task)[len(found) - 1]
    return found[-1].seconds * _operations(task, task.spec) / _operations(task, done)


def _steps(
    task: Task, transformer: Transformer, course: _Course, seconds: list[float], say: Callable[[str], None]
) -> None:
    """Make the steps of a course; what each took goes to the end of `seconds`, those that warm up included."""
    train = task.options.train
    lora.attach(transformer, task.lora, seed=0)
    optimizer, terms = Optimizer(train, lora.parameters(transformer)), Terms(0, train, task.lora.dropout)
    steps = course.warm_up + course.steps
    for number in range(steps):
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
        left = f"; {_about((steps - number - 1) * seconds[-1])} left" if number + 1 < steps else ""
        warm = " (warm-up)" * (number < course.warm_up)
        say(f"step {number + 1} of {steps}: {seconds[-1]:.3g} s{warm}{left}")


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
