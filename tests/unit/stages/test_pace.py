"""How long a step takes: the product's own steps on noise, whole or put together from parts."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from tiny.project import Project, relay

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import bench
from flux2_relay.stages.sizes import TransformerSpec
from flux2_relay.stages.train import pace
from flux2_relay.stages.train.layout import LayoutOptions
from flux2_relay.stages.train.options import LoraOptions, MemoryOptions, TrainOptions

SPEC = TransformerSpec(
    double_blocks=2, single_blocks=3, heads=2, head_dim=32, context_width=64, guidance=True, rope_axes=(8, 8, 8, 8)
)


def task(**changes: object) -> pace.Task:
    options = LayoutOptions(train=TrainOptions(batch=2, accumulate=2, dtype="float32"), memory=MemoryOptions(bits=32))
    made = pace.Task(spec=SPEC, options=options, lora=LoraOptions(rank=2), size=(4, 4), text_rows=8, steps=2)
    return replace(made, **changes)


def budget(of: pace.Task, size: int, **changes: object) -> pace.Task:
    memory = replace(of.options.memory, budget=size, **changes)
    return replace(of, options=replace(of.options, memory=memory))


def test_a_model_that_fits_is_measured() -> None:
    said: list[str] = []
    found = pace.find(task(), None, said.append)
    assert not found.computed
    assert 0 < found.seconds <= found.slowest
    assert found.layout.resident == found.layout.blocks == 5
    assert [line.split(":")[0] for line in said[1:]] == [f"step {n} of 4" for n in range(1, 5)]
    assert said[1].endswith("(warm-up)")
    assert not said[3].endswith("(warm-up)")


def test_the_peak_is_that_of_the_steps() -> None:
    found = pace.find(task(), None, lambda _: None)
    weights = found.layout.parts["weights"]
    assert weights < found.peak_bytes < 2 * found.layout.peak_bytes


def test_a_model_that_does_not_fit_is_computed_from_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    large = task(spec=replace(SPEC, double_blocks=8, single_blocks=20))
    part = pace._layout(task(spec=replace(SPEC, double_blocks=3, single_blocks=1)))
    tight = budget(large, part.peak_bytes + 100_000)
    of_blocks = {(1, 1): 10.0, (3, 1): 14.0, (1, 3): 11.0}  # a double block 2 s, a single one 0.5 s, the rest 7.5 s

    def timed(of: pace.Task, *_: object) -> list[float]:
        return [of_blocks[of.spec.double_blocks, of.spec.single_blocks]] * of.steps

    monkeypatch.setattr(pace, "_steps", timed)
    monkeypatch.setattr(pace, "random_transformer", lambda *_, **__: _Nothing())
    found = pace.find(tight, None, lambda _: None)
    assert found.computed
    assert found.seconds == pytest.approx(7.5 + 8 * 2 + 20 * 0.5)
    assert found.layout.streamed


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
