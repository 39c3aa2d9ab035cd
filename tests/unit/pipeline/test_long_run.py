"""A run of many steps neither grows nor piles up work: arrays, objects and resident bytes are counted, not time.

STEPS=2000 (`make torture`) for the long form.
"""

import gc
import os
from collections.abc import Callable, Iterator
from statistics import median

import mlx.core as mx
import pytest
from tiny.project import Project

from flux2_relay.stages.measure import resident_bytes
from flux2_relay.stages.train import running

STEPS = int(os.environ.get("STEPS", "100"))
EVERY = STEPS // 100
WARM = 30  # samples of a hundred, in which caches and allocators fill

OF_ARRAYS, OF_OBJECTS, OF_PROCESS = 20_000, 30, 3_000_000
"""Bytes (a batch read ahead more or less), objects and bytes by which the last samples may lie above the first."""


Sample = tuple[int, int, int]
"""Bytes of live arrays, objects, resident bytes; a plain tuple of numbers is none of the collector's objects."""


@pytest.fixture(autouse=True)
def _only_what_comes() -> Iterator[None]:
    """Leave all objects of before out of the count, and out of the collector's work."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def sample() -> Sample:
    gc.collect()
    return mx.get_active_memory(), len(gc.get_objects()), resident_bytes()


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """Samples of what lives behind every so many steps."""
    samples, real = [], running.Run.step

    def step(run: running.Run, loaded):
        result = real(run, loaded)
        if run.done % EVERY == 0:
            samples.append(sample())
        return result

    monkeypatch.setattr(running.Run, "step", step)
    return samples


def growth(samples: list[Sample]) -> list[str]:
    """What has grown between the first and the last fifth of the samples behind the warm ones."""
    assert len(samples) == 100
    first, last = samples[WARM : WARM + 14], samples[-14:]
    limits = {"arrays": OF_ARRAYS, "objects": OF_OBJECTS, "process": OF_PROCESS}
    medians = [[median(column) for column in zip(*part, strict=True)] for part in (first, last)]
    grown = dict(zip(limits, (after - before for before, after in zip(*medians, strict=True)), strict=True))
    return [f"{name}: {grown[name]:+}" for name in limits if grown[name] > limits[name]]


def test_a_long_run_does_not_grow(encoded: Callable[..., Project], monkeypatch: pytest.MonkeyPatch) -> None:
    samples = watched(monkeypatch)
    project = encoded(
        train={"steps": STEPS, "batch": 1, "accumulate": 2, "ema": 0.99, "schedule": "cosine"},
        lora={"targets": ["transformer_blocks.1.attn.to_q", "single*.attn.to_out"], "dropout": 0.1},
        previews={"every": 0, "prompts": ["a blue dog"]},
        save={"every": STEPS // 3, "keep": 2},
        validation={"fraction": 0.2, "every": STEPS // 4},
    )
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert len(project.metrics("step")) == STEPS
    assert growth(samples) == []


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("arrays", lambda: mx.zeros(1024) + 1),
        ("objects", lambda: [0]),
        ("process", lambda: b"x" * 100_000),
    ],
)
def test_a_leak_would_be_seen(name: str, leak: Callable[[], object]) -> None:
    kept, samples = [], []
    for _ in range(100):
        kept.append(leak())
        mx.eval([value for value in kept if isinstance(value, mx.array)])
        samples.append(sample())
    assert name in [grown.split(":")[0] for grown in growth(samples)]
