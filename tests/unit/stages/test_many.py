"""Several trainings over one base: each is, bit for bit, what it is alone, and a block is fetched once for all."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import pytest
from tiny.project import Project

from flux2_relay.cache.errors import RelayError
from flux2_relay.pipeline import commands
from flux2_relay.pipeline.config import load_config
from flux2_relay.stages import quantize
from flux2_relay.stages.train import loop, many, shared_base, step, turns
from flux2_relay.stages.train.job import Job
from flux2_relay.stages.train.residence import Resident, Streamed
from flux2_relay.stages.train.transformer import Transformer, block_shapes, load_transformer


@dataclass
class Lines:
    """A journal in memory."""

    steps: list[Mapping[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def write(self, line: Mapping[str, Any]) -> None:
        self.steps.append(line)

    def write_validation(self, line: Mapping[str, Any]) -> None:
        self.steps.append(line)

    def rewind(self, step: int) -> None:
        self.steps = [line for line in self.steps if line["step"] <= step]

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def numbers(self) -> list[dict[str, Any]]:
        timed = ("seconds", "wait_seconds", "peak_bytes")
        return [{key: value for key, value in line.items() if key not in timed} for line in self.steps]


def lines(one: many.Entry) -> Lines:
    assert isinstance(one.journal, Lines)
    return one.journal


def entry(project: Project, name: str, *settings: str, **changes: object) -> many.Entry:
    config = load_config(project.config, [f"run.name={name}", "previews.every=0", *settings])
    config.run.folder.mkdir(parents=True, exist_ok=True)
    job = commands.train_job(config, commands.ready(config), config.run.folder)
    return many.Entry(name=name, job=replace(job, **changes), journal=Lines())


def load(job: Job) -> Transformer:
    bits = int(job.memory.bits)
    ready = commands.ready(load_config(job.folder.parent.parent / "config.yaml"))
    residence = Streamed if job.memory.stream == "always" else Resident
    return load_transformer(ready.places.root, ready.spec, bits, mx.float32, residence)


def adapter(one: many.Entry, name: str = "adapter.safetensors") -> dict[str, mx.array]:
    values = mx.load(str(one.job.folder / name))
    assert isinstance(values, dict)
    return values


VARIED = {
    "rank": ("lora.rank=3", "train.lr=3e-3"),
    "short": ("train.steps=3", "train.batch=1", "lora.targets=[to_q]"),
    "apart": ("run.seed=9", "train.accumulate=2", "lora.targets=[attn.to_out]", "lora.dropout=0.2"),
    "dora": ("lora.kind=dora", "train.steps=2"),
    "lokr": ("lora.kind=lokr", "train.steps=2"),
    "held out": ("validation.fraction=0.3", "validation.every=2", "train.ema=0.9", "train.optimizer=lion"),
}


@pytest.mark.parametrize("memory", [("memory.bits=32",), ("memory.bits=4", "memory.stream=always")])
def test_each_run_is_bit_for_bit_what_it_is_alone(encoded: Any, memory: tuple[str, ...]) -> None:
    runs, alone = encoded(), encoded()
    entries = [entry(runs, name, *memory, *settings) for name, settings in VARIED.items()]
    model = load(entries[0].job)
    ended = many.train(entries, model)
    model.residence.close()
    assert {name: (of.done, of.fault) for name, of in ended.items()} == {
        name: (int(dict(s.split("=", 1) for s in of).get("train.steps", 6)), None) for name, of in VARIED.items()
    }
    for one in entries:
        other = entry(alone, one.name, *memory, *VARIED[one.name])
        model = load(other.job)
        loop.train(other.job, model, other.journal)
        model.residence.close()
        assert lines(one).numbers() == lines(other).numbers()
        found, expected = adapter(one), adapter(other)
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[key], expected[key]) for key in expected), one.name


JOINED = {
    "wide": ("lora.rank=4", "train.lr=1e-3"),
    "narrow": ("lora.rank=2", "lora.alpha=3", "lora.targets=[to_q, to_qkv_mlp_proj]"),
    "late": ("run.seed=5", "train.steps=20", "lora.targets=[single_transformer_blocks.1.attn.to_out]"),
    "more": ("lora.rank=3", "train.steps=4", "train.accumulate=2"),
}
APART = {"dropping": ("lora.dropout=0.2",), "dora": ("lora.kind=dora",)}
STREAMED = ("memory.bits=8", "memory.stream=always", "train.steps=3")


@pytest.mark.parametrize(
    ("memory", "varied"), [(("memory.bits=32",), JOINED), (STREAMED, JOINED | APART)], ids=["fifty steps", "streamed"]
)
def test_joined_runs_equal_the_runs_alone(
    encoded: Any, memory: tuple[str, ...], varied: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5: products over more rows may be summed in another order."""
    changes = {"train": {"steps": 50, "batch": 1}, "save": {"every": 50}}
    runs, alone, joined, through = encoded(**changes), encoded(**changes), Counter[int](), step.side_by_side
    entries = [entry(runs, name, *settings, *memory) for name, settings in varied.items()]
    model = load(entries[0].job)
    model.joins = True
    monkeypatch.setattr(step, "side_by_side", lambda *of: (joined.update([len(of[1])]), through(*of))[1])
    many.train(entries, model)
    model.residence.close()
    assert joined[2] + joined[3] + joined[4] >= (50 if varied is JOINED else 3), "those of one bucket are joined"
    for one in entries:
        other = entry(alone, one.name, *varied[one.name], *memory)
        model = load(other.job)
        loop.train(other.job, model, other.journal)
        model.residence.close()
        for line, wanted in zip(lines(one).numbers(), lines(other).numbers(), strict=True):
            assert line == {key: pytest.approx(value, rel=1e-5) for key, value in wanted.items()}
        found, expected = adapter(one), adapter(other)
        assert found.keys() == expected.keys()
        assert max(float(mx.abs(found[key] - expected[key]).max()) for key in expected) < 1e-5


class Counted(Streamed):
    """Counts what is read."""

    def __init__(self, blocks: int, read: Any) -> None:
        self.read: list[int] = []
        super().__init__(blocks, lambda place: (self.read.append(place), read(place))[1])


def test_a_block_is_read_and_made_dense_once_for_all_runs(encoded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back, less the block at the turn; the run that begins its way back later goes with the others."""
    project = encoded()
    settings = ("train.steps=1", "train.accumulate=1", "memory.bits=8")
    targets = {"all": "attention", "two": "attention", "late": "[single_transformer_blocks.1.attn.to_out]"}
    entries = [entry(project, name, *settings, f"lora.targets={of}") for name, of in targets.items()]
    ready = commands.ready(load_config(project.config))
    model = load_transformer(ready.places.root, ready.spec, 8, mx.float32, Counted)
    dense: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        shared_base, "dense", lambda weight, *rest: (dense.append(weight[0].shape), quantize.dense(weight, *rest))[1]
    )
    many.train(entries, model)
    blocks = ready.spec.blocks
    assert isinstance(model.residence, Counted)
    assert model.residence.read[: 2 * blocks - 1] == [*range(blocks), *reversed(range(blocks - 1))]
    assert len(model.residence.read) <= 2 * blocks  # one may have been read ahead of a next step
    matrices = [sum(len(s) == 2 for s in block_shapes(ready.spec, place).values()) for place in range(blocks)]
    assert len(dense) == 2 * sum(matrices) - matrices[-1]
    model.residence.close()


def test_what_goes_wrong_in_a_run_ends_it_alone(encoded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded()
    entries = [entry(project, name, f"train.lr={lr}") for name, lr in (("one", "1e-3"), ("two", "2e-3"), ("3", "3e-3"))]
    learn = loop.Run.learn

    def bad(self: Any, loaded: Any, found: Any, started: float) -> float | None:
        if self.job.folder.name == "two":
            found = (found[0] * mx.nan, found[1], found[2])
        if self.job.folder.name == "3" and loaded.step == 1:
            raise OSError("no such disk")
        return learn(self, loaded, found, started)

    monkeypatch.setattr(loop.Run, "learn", bad)
    model = load(entries[0].job)
    ended = many.train(entries, model)
    assert ended["one"] == many.Ended(done=6)
    assert ended["two"].done == 5
    assert "5th such step in a row" in (ended["two"].fault or "")
    assert "no such disk" in (ended["3"].fault or "")
    assert [(one.job.folder / "adapter.safetensors").exists() for one in entries] == [True, False, False]
    assert [len(lines(one).steps) for one in entries] == [6, 5, 1]


def test_a_run_may_be_asked_to_stop(encoded: Any) -> None:
    project = encoded()
    entries = [entry(project, "one", stop=lambda: True), entry(project, "two"), entry(project, "three", max_steps=2)]
    (entries[1].job.folder / ".save").touch()
    ended = many.train(entries, load(entries[0].job))
    assert {name: of.done for name, of in ended.items()} == {"one": 1, "two": 6, "three": 2}
    assert (entries[1].job.checkpoints / "000004").exists()
    assert all((one.job.folder / "adapter.safetensors").exists() for one in entries)


def test_a_failing_device_stops_all_and_says_where_each_goes_on(encoded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded()
    entries = [entry(project, "one", "save.every=1"), entry(project, "two")]
    together = many.gradients_together

    def fails(ways: Any) -> Any:
        if lines(entries[0]).steps:
            raise RuntimeError("[METAL] out of memory")
        return together(ways)

    monkeypatch.setattr(many, "gradients_together", fails)
    with pytest.raises(RelayError, match="one: the next start goes on from the checkpoint of step 1; two: the next"):
        many.train(entries, load(entries[0].job))


def test_ways_of_different_lengths_meet_at_the_same_numbers() -> None:
    met: list[tuple[str, int]] = []

    def way(name: str, numbers: list[int]) -> Any:
        for number in numbers:
            yield number
            met.append((name, number))
        return name

    ways = [way("a", [0, 1, 2, 3]), way("b", [0, 3, 5]), turns.shifted(way("c", [0, 1]), 2), way("d", [])]
    assert turns.together(ways) == ["a", "b", "c", "d"]
    assert met == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("c", 0), ("a", 3), ("b", 3), ("c", 1), ("b", 5)]
