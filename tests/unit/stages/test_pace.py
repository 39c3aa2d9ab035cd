"""How long a step takes: the product's own steps on noise, whole or put together from parts."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from tiny.project import Project, relay

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import bench
from flux2_relay.stages.sizes import TransformerSpec
from flux2_relay.stages.train import course, pace
from flux2_relay.stages.train.layout import LayoutOptions
from flux2_relay.stages.train.options import LoraOptions, MemoryOptions, TrainOptions

SPEC = TransformerSpec(
    double_blocks=2, single_blocks=3, heads=2, head_dim=32, context_width=64, guidance=True, rope_axes=(8, 8, 8, 8)
)


def task(**changes: object) -> course.Task:
    options = LayoutOptions(train=TrainOptions(batch=2, accumulate=2, dtype="float32"), memory=MemoryOptions(bits=32))
    made = course.Task(spec=SPEC, options=options, lora=LoraOptions(rank=2), size=(4, 4), text_rows=8, steps=2)
    return replace(made, **changes)


def budget(of: course.Task, size: int, **changes: object) -> course.Task:
    memory = replace(of.options.memory, budget=size, **changes)
    return replace(of, options=replace(of.options, memory=memory))


def test_a_model_that_fits_is_measured() -> None:
    said: list[str] = []
    found = pace.find(task(), None, said.append)
    assert not found.computed
    assert 0 < found.seconds <= found.slowest
    assert found.layout.resident == found.layout.blocks == 5
    assert said[0].startswith("4 steps, about 1 s: by the speed of one product a step")
    assert [line.split(":")[0] for line in said[2:]] == [f"step {n} of 4" for n in range(1, 5)]
    assert ["(warm-up)" in line for line in said[2:]] == [True, True, False, False]
    assert ["left" in line for line in said[2:]] == [True, True, True, False]


def test_the_peak_is_that_of_the_steps() -> None:
    found = pace.find(task(), None, lambda _: None)
    weights = found.layout.parts["weights"]
    assert weights < found.peak_bytes < 2 * found.layout.peak_bytes


def test_a_model_that_does_not_fit_is_computed_from_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    large = task(spec=replace(SPEC, double_blocks=8, single_blocks=20))
    part = pace._layout(task(spec=replace(SPEC, double_blocks=3, single_blocks=1)))
    tight = budget(large, part.peak_bytes + 100_000)
    of_blocks = {(1, 1): 10.0, (3, 1): 14.0, (1, 3): 11.0}  # a double block 2 s, a single one 0.5 s, the rest 7.5 s

    pretend(monkeypatch, of_blocks)
    found = pace.find(tight, None, lambda _: None)
    assert found.computed
    assert found.timed == 2
    assert found.seconds == pytest.approx(7.5 + 8 * 2 + 20 * 0.5)
    assert found.layout.streamed


def pretend(monkeypatch: pytest.MonkeyPatch, of_blocks: dict[tuple[int, int], float], end: int = 99) -> None:
    """Steps take these seconds by double and single blocks; Ctrl-C comes instead of step `end` of all of them."""
    made = []

    def timed(of: course.Task, _: object, chosen: course.Course, seconds: list[float], *__: object) -> None:
        for _ in range(chosen.warm_up + chosen.steps):
            made.append(of)
            if len(made) == end:
                raise KeyboardInterrupt
            seconds.append(of_blocks[of.spec.double_blocks, of.spec.single_blocks])

    monkeypatch.setattr(pace, "_steps", timed)
    monkeypatch.setattr(pace, "random_transformer", lambda *_, **__: _Nothing())


WHOLE, THREE, ONE = 0, 3, 1
LARGE = replace(SPEC, double_blocks=8, single_blocks=20)
NORMAL = course.Speed(operations=1.0, weights=float("inf"))


@pytest.mark.parametrize(
    ("seconds", "steps", "expected"),
    [
        (1, None, (2, 5, WHOLE)),
        (1, 9, (2, 9, WHOLE)),
        (60, None, (1, 2, WHOLE)),
        (110, None, (1, 1, WHOLE)),
        (160, None, (1, 2, THREE)),
        (350, None, (1, 1, THREE)),
        (500, None, (1, 1, ONE)),
        (110, 1, (1, 1, WHOLE)),
        (1e9, 1, (1, 1, ONE)),
    ],
)
def test_the_slower_the_machine_the_less_is_timed(
    seconds: float, steps: int | None, expected: tuple[int, int, int]
) -> None:
    of = task(steps=steps, spec=LARGE)
    speed = replace(NORMAL, operations=course.operations(of) / seconds)
    chosen = course.choose(of, speed, fits=True)
    assert (chosen.warm_up, chosen.steps, len(chosen.parts)) == expected
    assert chosen.step_seconds == pytest.approx(seconds)
    assert course.choose(of, speed, fits=False).parts


@pytest.mark.parametrize("seconds", [1.0, 100.0, 300.0, 1000.0, 10_000.0, 100_000.0])
@pytest.mark.parametrize("fits", [True, False])
def test_whatever_is_chosen_is_over_within_minutes(seconds: float, fits: bool) -> None:
    of = task(steps=None, spec=replace(SPEC, double_blocks=8, single_blocks=48), size=(64, 64), text_rows=512)
    chosen = course.choose(of, replace(NORMAL, operations=course.operations(of) / seconds), fits)
    made = chosen.parts or (of,)
    work = (chosen.warm_up + chosen.steps) * sum(map(course.operations, made))
    assert chosen.seconds == pytest.approx(work * seconds / course.operations(of))
    assert chosen.seconds < course.LONG_SECONDS


def test_making_weights_counts() -> None:
    of = task(steps=None)
    slow = course.Speed(operations=float("inf"), weights=1.0)
    assert len(course.choose(of, slow, fits=True).parts) == ONE
    assert not course.choose(of, replace(slow, weights=float("inf")), fits=True).parts


def test_fewer_tokens_where_even_two_blocks_take_too_long() -> None:
    of = task(steps=None, spec=LARGE, size=(32, 48), text_rows=512)
    (part,) = course.choose(of, replace(NORMAL, operations=course.operations(of) / 30_000), fits=True).parts
    assert (part.size, part.text_rows) == ((8, 12), 32)
    said = course.in_blocks(part, of)
    assert said == "1 double and 1 single of the 28 blocks, 192 x 128 pixels and 32 text rows"
    assert course.whole(of, [part], [2.0]) == pytest.approx(2 * course.operations(of) / course.operations(part))


def test_steps_that_take_longer_than_was_forecast_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end has come when the first step is over: neither the others nor the other parts are begun."""
    monkeypatch.setattr(course, "END_SECONDS", 0.0)
    said: list[str] = []
    found = pace.find(task(steps=None), None, said.append)
    assert (found.timed, found.stopped, found.computed) == (0, False, False)
    assert "too long" in said[-1]
    monkeypatch.setattr(pace, "_in_memory", lambda _: None)
    found = pace.find(task(steps=None, spec=LARGE), None, said.append)
    assert (found.timed, found.stopped, len(found.parts)) == (0, False, 1)
    assert found.scaled
    assert pace.find(task(), None, said.append).timed == 2  # whoever says how many gets them


def test_real_weights_that_take_too_long_are_timed_as_random_parts(
    dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, dev, pictures).write()
    monkeypatch.setattr(course, "operations_a_second", lambda of: course.operations(of) / 10_000)
    outcome = relay("bench", "-c", project.config)
    assert outcome.status == 0, outcome.said
    line = outcome.said.splitlines()[-1]
    assert "random weights" in line
    assert "scaled by operations from 1 double and 1 single of the" in line


def test_operations_are_those_of_three_passes_through_the_blocks() -> None:
    """By hand: two operations for each weight and token, of which a double block's streams see their own each."""
    of, width = task(), SPEC.hidden
    weights = 2 * 13 * width**2 + 3 * 13 * width**2  # a block has 4 + 9 matrices of width x width for each token
    forward = 2 * weights * (16 + 8) + 5 * 4 * width * (16 + 8) ** 2
    assert course.operations(of) == pytest.approx(3 * 4 * forward, rel=0.01)


@pytest.mark.parametrize(("end", "timed", "seconds"), [(2, 0, 3.0), (3, 0, 3.0), (5, 2, 3.0)])
def test_ctrl_c_ends_it_with_what_was_timed(
    monkeypatch: pytest.MonkeyPatch, end: int, timed: int, seconds: float
) -> None:
    pretend(monkeypatch, {(2, 3): 3.0}, end)
    found = pace.find(task(steps=5), None, lambda _: None)
    assert (found.timed, found.seconds, found.stopped, found.computed) == (timed, seconds, True, False)


@pytest.mark.parametrize("end", [5, 8])
def test_ctrl_c_among_parts_leaves_what_operations_tell(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    large = task(spec=replace(SPEC, double_blocks=9, single_blocks=9))
    monkeypatch.setattr(pace, "_in_memory", lambda _: None)
    pretend(monkeypatch, {(1, 1): 2.0, (3, 1): 4.0}, end)  # a step is as long as its blocks, all of one length
    found = pace.find(large, None, lambda _: None)
    assert (found.scaled, found.stopped, found.computed) == (True, True, True)
    assert found.seconds == pytest.approx(18.0, rel=0.01)


def test_ctrl_c_before_the_first_step_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CATALOGUE", {"klein-base-4b": (SPEC, False)})
    pretend(monkeypatch, {}, end=1)
    outcome = relay("bench")
    assert outcome.status == 130
    assert outcome.said.endswith("relay: stopped before the first step was over; nothing was timed\n")


def test_ctrl_c_leaves_a_line_and_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CATALOGUE", {"klein-base-4b": (SPEC, False)})
    pretend(monkeypatch, {(2, 3): 3.0}, end=4)
    outcome = relay("bench", "--resolution", 64)
    assert outcome.status == 130
    assert "3 s a step (median of 1, stopped early)" in outcome.said
    assert "relay: stopped before the last step" in outcome.said


def test_sigterm_ends_it_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CATALOGUE", {"klein-base-4b": (SPEC, False)})
    before = signal.getsignal(signal.SIGTERM)

    def steps(_: object, __: object, ___: object, seconds: list[float], *____: object) -> None:
        seconds += [3.0, 3.0, 3.0]
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(pace, "_steps", steps)
    monkeypatch.setattr(pace, "random_transformer", lambda *_, **__: _Nothing())
    outcome = relay("bench", "--resolution", 64)
    assert outcome.status == 143
    assert "(median of 1, stopped early)" in outcome.said
    signal.signal(signal.SIGTERM, before)


class _Nothing:
    """Stands for a transformer."""

    keep = attention_heads = 0

    @property
    def residence(self) -> "_Nothing":
        return self

    def close(self) -> None:
        """Nothing is being read."""


def test_too_little_for_anything_is_refused() -> None:
    with pytest.raises(InputError, match="too little"):
        pace.find(budget(task(), 1000), None, lambda _: None)


def test_random_weights_are_made_at_the_asked_width_and_are_the_same_again() -> None:
    layout = pace._layout(task())
    one, two = (pace.random_transformer(SPEC, replace(layout, bits=8)) for _ in range(2))
    first, second = (t.residence.weights(0)["attn.to_q"] for t in (one, two))
    assert isinstance(first, tuple)
    assert all(mx.array_equal(a, b) for a, b in zip(first, second, strict=True))
    other = one.residence.weights(1)["attn.to_q"]
    assert not mx.array_equal(first[0], other[0])


def test_the_line_of_real_weights(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path, dev, pictures).write()
    outcome = relay("bench", "-c", project.config, "--steps", 1)
    assert outcome.status == 0, outcome.said
    line = outcome.said.splitlines()[-1]
    for words in (
        "real weights",
        "32 bit, all in memory",
        "64 x 64, batch 2, rank 2",
        "s a step (median of 1)",
        "mlx 0.",
    ):
        assert words in line


def test_the_object_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CATALOGUE", {"klein-base-4b": (SPEC, False)})
    outcome = relay("bench", "--steps", 1, "--resolution", 40, "--bits", 32, "--json")
    assert outcome.status == 0, outcome.said
    told = json.loads(outcome.said.splitlines()[-1])
    assert (told["model"], told["weights"], told["resolution"], told["bits"]) == ("klein-base-4b", "random", 32, 32)
    assert told["how"] == "measured"
    assert told["seconds_a_step"] > 0
