"""What is timed to know a training's pace, so that it is over within minutes: the whole model, or a share of it.

The operations of a step over those that one product of the model's width reaches in a second tell how long a step
should take. As many steps of the whole are timed as that leaves time for; then of models of a few blocks, which give
the time of one block of each kind and of the rest; then of the smallest of these alone, with fewer tokens if need be,
from which the whole is scaled by its operations.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.layout import LayoutOptions
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import double_shapes, single_shapes

LONG_SECONDS = 300.0
"""What is forecast to take longer is not begun, unless nothing shorter is left."""
END_SECONDS = 2 * LONG_SECONDS
"""Where the forecast was too short, no step begins that would end later than this."""
_WARM_UP = 2  # steps in which kernels are compiled and buffers are made; one where steps are long
_STEPS = 5  # timed ones, where nobody says how many
_PROBE_ROWS, _PROBES, _PROBE_SECONDS = 512, 8, 2.0
_PARTS = (1, 1), (3, 1), (1, 3)
"""Double and single blocks of the models that stand for the whole: in this order, the smallest first."""
_FEWEST_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A training whose pace is asked for, or a share of it."""

    spec: TransformerSpec
    options: LayoutOptions
    lora: LoraOptions
    size: tuple[int, int]
    """Rows and columns of the picture in tokens."""
    text_rows: int
    steps: int | None = None
    """Timed steps, after those that warm up; None: five, or fewer where these would take long."""

    @property
    def dtype(self) -> mx.Dtype:
        """What a step computes in."""
        return mx.float32 if self.options.train.dtype == "float32" else mx.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What is made: so many steps of the whole model, or of each of its parts."""

    warm_up: int
    steps: int
    parts: tuple[Task, ...]
    """Shares of the task, the smallest first; none: the whole."""
    step_seconds: float
    """What a step of the whole should take."""
    seconds: float
    """What all of it should take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of this machine."""

    operations: float
    """A second, of one product of the model's width."""
    weights: float
    """Random ones made in a second; infinite where none are made."""


def choose(task: Task, speed: Speed, fits: bool) -> Course:
    """The most exact course that is short; the shortest where none is. `fits`: the whole model stays in memory."""
    made = (_course(task, speed, *rung) for rung in _rungs(task) if fits or rung[2])
    last = None
    for last in made:
        if last.seconds < LONG_SECONDS:
            break
    assert last is not None  # the parts are always there
    return last


def _rungs(task: Task) -> Iterator[tuple[int, int, tuple[Task, ...]]]:
    """Warm-up steps, timed steps and parts; the first that is short enough is made."""
    few = tuple(replace(task, spec=replace(task.spec, double_blocks=d, single_blocks=s)) for d, s in _PARTS)
    many = _WARM_UP, _STEPS
    for (warm_up, steps), parts in (many, ()), ((1, 2), ()), ((1, 1), ()), (many, few), ((1, 2), few), ((1, 1), few):
        yield warm_up, task.steps or steps, parts
    least = few[0]
    while True:
        yield 1, task.steps or 1, (least,)
        rows, columns = least.size
        if rows * columns <= _FEWEST_TOKENS:
            return
        least = replace(least, size=(max(1, rows // 2), max(1, columns // 2)), text_rows=max(1, least.text_rows // 4))


def _course(task: Task, speed: Speed, warm_up: int, steps: int, parts: tuple[Task, ...]) -> Course:
    made = parts or (task,)
    seconds = (warm_up + steps) * sum(map(operations, made)) / speed.operations
    return Course(
        warm_up=warm_up,
        steps=steps,
        parts=parts,
        step_seconds=operations(task) / speed.operations,
        seconds=seconds + sum(_weights(of.spec) for of in made) / speed.weights,
    )


def operations(task: Task) -> float:
    """Of a step: two for each weight of the blocks and token that meets it, and attention's.

    Three times those of a forward pass: the pass itself, the one that recomputes, and the gradients of the inputs.
    """
    (rows, columns), train, spec = task.size, task.options.train, task.spec
    tokens = rows * columns + task.text_rows
    double, single = _of_blocks(spec)
    forward = 2 * (double / 2 + single) * tokens  # a double block has a half for each stream
    forward += 4 * spec.blocks * spec.hidden * tokens**2
    return 3.0 * forward * train.batch * train.accumulate


def _of_blocks(spec: TransformerSpec) -> tuple[float, float]:
    """Weights of all double and of all single blocks."""
    double, single = (sum(map(math.prod, shapes(spec).values())) for shapes in (double_shapes, single_shapes))
    return spec.double_blocks * double, spec.single_blocks * single


def _weights(spec: TransformerSpec) -> float:
    return sum(_of_blocks(spec))


def operations_a_second(task: Task) -> float:
    """What a product of the model's width reaches here: the best of a few, since other programs may be in the way."""
    width = task.spec.hidden
    a, b = mx.zeros((_PROBE_ROWS, width), task.dtype), mx.zeros((width, width), task.dtype)
    mx.eval(a, b)
    best, began = math.inf, time.perf_counter()
    for number in range(_PROBES):
        started = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - started)
        if number and time.perf_counter() - began > _PROBE_SECONDS:
            break
    return 2.0 * _PROBE_ROWS * width * width / best


def are_too_few(parts: Sequence[Task]) -> bool:
    """Whether these parts do not tell the kinds of block apart."""
    return 0 < len(parts) < len(_PARTS)


def whole(task: Task, parts: Sequence[Task], seconds: Sequence[float]) -> float:
    """Seconds of a step of the whole from those of its parts, in the order of a course.

    Whole = rest + double blocks x one + single blocks x one, each from the difference of two models. Where there are
    too few, as if every operation took as long as every other.
    """
    if are_too_few(parts):
        return seconds[-1] * operations(task) / operations(parts[-1])
    least, more_double, more_single = seconds
    a_double = (more_double - least) / (_PARTS[1][0] - _PARTS[0][0])
    a_single = (more_single - least) / (_PARTS[2][1] - _PARTS[0][1])
    rest = least - a_double - a_single
    return max(least, rest + task.spec.double_blocks * a_double + task.spec.single_blocks * a_single)


def announced(task: Task, course: Course) -> str:
    """How long it will take, and what."""
    what = f"{course.warm_up + course.steps} steps"
    if are_too_few(course.parts):
        what += f" of {in_blocks(course.parts[0], task)}"
    elif course.parts:
        what += f" of each of {len(course.parts)} models of a few of the {task.spec.blocks} blocks"
    return (
        f"{what}, {about(course.seconds)}: by the speed of one product a step of "
        f"the whole model takes {about(course.step_seconds)}. Ctrl-C ends it with what was timed"
    )


def in_blocks(part: Task, task: Task) -> str:
    """What a part has of the whole."""
    of = part.spec
    said = f"{of.double_blocks} double and {of.single_blocks} single of the {task.spec.blocks} blocks"
    if part.size == task.size:
        return said
    rows, columns = part.size
    return f"{said}, {16 * columns} x {16 * rows} pixels and {part.text_rows} text rows"


def about(seconds: float) -> str:
    """A forecast, no finer than it deserves."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
