"""How long a step takes on this machine: the steps of a training, on noise instead of a data set.

Gradients, clipping and update are those of `step.py` and `optimizer.py`; only items and, where no model is given, the
weights are random: they are made a block at a time, so that a model needs no more memory than it does in training.
A model that stays in memory at no width, or whose steps would take too long, is timed in parts with random weights
(`course.py`), and the whole is called computed. Reading blocks from disk is not in it.

How long all of it will take is told before it begins, and Ctrl-C ends it with what was timed so far.
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
from flux2_relay.stages.train import course, lora
from flux2_relay.stages.train.batches import Draw, Item, Loaded
from flux2_relay.stages.train.course import Course, Task
from flux2_relay.stages.train.layout import Layout, layout_for
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.optimizer import Optimizer, clip
from flux2_relay.stages.train.residence import Resident, Streamed
from flux2_relay.stages.train.step import Terms, gradients_of
from flux2_relay.stages.train.transformer import Transformer, block_shapes, image_ids, outer_shapes, text_ids

_CACHE_BYTES = 1 << 30  # as in training


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What was found."""

    layout: Layout
    seconds: float
    """Of the median step."""
    slowest: float
    peak_bytes: int
    """Measured; of a computed pace that of the largest part."""
    timed: int
    """Steps behind the median, of each part; 0 where only steps that warm up were over."""
    stopped: bool = False
    """Ctrl-C came before the last step."""
    parts: tuple[Task, ...] = ()
    """What was timed instead of the whole: three kinds of part tell how long a block of each kind takes, from fewer the
    whole is scaled by operations."""

    @property
    def computed(self) -> bool:
        """Whether parts were timed, with random weights."""
        return bool(self.parts)

    @property
    def scaled(self) -> bool:
        """Whether the parts were too few to tell the kinds of block apart."""
        return course.are_too_few(self.parts)


Make = Callable[[TransformerSpec, Layout], Transformer]
"""A transformer as a layout has it, without adapters."""
Say = Callable[[str], None]


def find(task: Task, make: Make | None, say: Say) -> Pace:
    """The pace of a task, with the weights that `make` loads, or with random ones.

    InputError where it fits the budget in no way; KeyboardInterrupt where it came before the first step was over.
    """
    blas.suit(task.spec.hidden)
    mx.set_cache_limit(_CACHE_BYTES)
    whole = _layout(task) if make is not None else _in_memory(task)
    layout = whole or _layout(task)  # what a training would do
    chosen = course.choose(task, _speed(task, layout.bits, makes=make is None), fits=whole is not None)
    say(course.announced(task, chosen))
    clock = _Clock(say, None if task.steps else time.perf_counter() + course.END_SECONDS)
    if chosen.parts:
        return _computed(task, layout, chosen, clock)
    return _measured(task, layout, make or _random_weights(task), chosen, clock)


@dataclass(frozen=True, slots=True)
class _Clock:
    """Whom it is told how it goes, and when it has to be over."""

    say: Say
    end: float | None

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return self.end is None or time.perf_counter() + seconds < self.end


def _speed(task: Task, bits: int, makes: bool) -> course.Speed:
    width = task.spec.hidden
    started = time.perf_counter()
    _random({"probe": (width, width)}, bits, 0)
    weights = width**2 / (time.perf_counter() - started) if makes else math.inf
    return course.Speed(operations=course.operations_a_second(task), weights=weights)


def _in_memory(task: Task) -> Layout | None:
    """The layout with all blocks in memory, at whatever width it takes."""
    stays = replace(task.options, memory=replace(task.options.memory, stream="never"))
    try:
        return _layout(replace(task, options=stays))
    except InputError:
        return None


def _random_weights(task: Task) -> Make:
    return partial(random_transformer, dtype=task.dtype)


def _layout(task: Task) -> Layout:
    item = Item(id="noise", latents="", size=task.size, captions=())
    return layout_for(task.spec, [item], task.text_rows, lora.size(task.spec, task.lora), task.options)


def _measured(task: Task, layout: Layout, make: Make, chosen: Course, clock: _Clock) -> Pace:
    clock.say(layout.in_words())
    release()
    mx.reset_peak_memory()
    seconds: list[float] = []
    stopped = False
    with in_plain_words(lambda: "Nothing was changed."):
        transformer = make(task.spec, layout)
        transformer.keep, transformer.attention_heads = layout.keep, layout.heads
        try:
            _steps(task, transformer, chosen, seconds, clock)
        except KeyboardInterrupt:
            if not seconds:
                raise
            stopped = True
        finally:
            transformer.residence.close()
    peak, timed = peak_bytes(), seconds[chosen.warm_up :]
    del transformer
    release()
    told = timed or seconds
    return Pace(
        layout=layout, seconds=median(told), slowest=max(told), peak_bytes=peak, timed=len(timed), stopped=stopped
    )


def _computed(task: Task, layout: Layout, chosen: Course, clock: _Clock) -> Pace:
    """From parts of the model in memory, at the width that a training would have."""
    options = replace(task.options, memory=replace(task.options.memory, bits=layout.bits, stream="never"))
    found: list[Pace] = []
    for part in (replace(part, options=options) for part in chosen.parts):
        if found and not clock.has(_steps_of(chosen) * found[-1].seconds):
            clock.say("the other parts would take too long: scaled by operations from what was timed")
            break
        clock.say(f"{course.in_blocks(part, task)}:")
        try:
            found.append(_measured(part, _layout(part), _random_weights(task), chosen, clock))
        except KeyboardInterrupt:
            if not found:
                raise
            found[-1] = replace(found[-1], stopped=True)
        if found[-1].stopped:
            break
    parts = chosen.parts[: len(found)]
    seconds = course.whole(task, parts, [pace.seconds for pace in found])
    return Pace(
        layout=layout,
        seconds=seconds,
        slowest=seconds * max(pace.slowest / pace.seconds for pace in found),
        peak_bytes=max(pace.peak_bytes for pace in found),
        timed=min(pace.timed for pace in found),
        stopped=found[-1].stopped,
        parts=parts,
    )


def _steps_of(chosen: Course) -> int:
    return chosen.warm_up + chosen.steps


def _steps(task: Task, transformer: Transformer, chosen: Course, seconds: list[float], clock: _Clock) -> None:
    """Make the steps of a course; what each took goes to the end of `seconds`, those that warm up included."""
    train = task.options.train
    lora.attach(transformer, task.lora, seed=0)
    optimizer, terms = Optimizer(train, lora.parameters(transformer)), Terms(0, train, task.lora.dropout)
    steps = _steps_of(chosen)
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
        left = f"; {course.about((steps - number - 1) * seconds[-1])} left" if number + 1 < steps else ""
        warm = " (warm-up)" * (number < chosen.warm_up)
        clock.say(f"step {number + 1} of {steps}: {seconds[-1]:.3g} s{warm}{left}")
        if number + 1 < steps and not clock.has(seconds[-1]):
            clock.say("the next step would take too long: what was timed has to do")
            return


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
            side = math.sqrt(
                3 / shape[1]
            )  # uniform: of the same spread as normal ones, and made in a third of the time
            value = mx.random.uniform(-side, side, shape, mx.bfloat16, key=key)
            made[name] = quantize.pack(value, bits)
        else:
            made[name] = mx.ones(shape, mx.float32 if bits == 32 else mx.bfloat16)
        mx.eval(made[name])  # one matrix at a time: a block in bfloat16 beside its packed form would be the peak
    return made
