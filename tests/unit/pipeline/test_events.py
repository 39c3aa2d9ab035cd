"""`log.tensorboard`: the numbers of the metrics as event files."""

import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny.project import Project


def events(file: Path) -> Iterator[Any]:
    """Every record of an event file."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, at = file.read_bytes(), 0
    while at < len(data):  # length, its checksum, the record, its checksum
        (length,) = struct.unpack_from("<Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4


def scalars(file: Path) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of every number in an event file."""
    for event in events(file):
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


def starts(file: Path) -> list[int]:
    """The steps at which a session began: TensorBoard drops what it knows from there on."""
    return [event.step for event in events(file) if event.HasField("session_log")]


def files(project: Project) -> list[Path]:
    return sorted((project.run / "tensorboard").iterdir())


def test_numbers_are_those_of_the_metrics(encoded: Callable[..., Project]) -> None:
    pytest.importorskip("tensorboardX")
    project = encoded(
        train={"steps": 3},
        log={"tensorboard": True},
        validation={"fraction": 0.2, "every": 2},
        previews={"every": 0, "prompts": ["a blue dog"]},
    )
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    (file,) = files(project)
    found = {(step, tag): value for step, tag, value in scalars(file)}
    for step, loss, lr, norm in project.metrics("step", "loss", "lr", "grad_norm"):
        expected = {"loss": loss, "lr": lr, "grad_norm": norm}
        assert {tag: found[step, tag] for tag in expected} == pytest.approx(expected)  # pyright: ignore
    assert {step for step, tag in found if tag == "held_out_loss"} == {0, 2, 3}


def test_a_resumed_run_begins_a_file_behind_its_checkpoint(encoded: Callable[..., Project]) -> None:
    pytest.importorskip("tensorboardX")
    project = encoded(train={"steps": 2}, log={"tensorboard": True}, previews={"every": 0, "prompts": ["a blue dog"]})
    assert project.relay("train", "--max-steps", 1).status == 0
    before = files(project)
    for file in before:  # event files are named by the second
        file.rename(file.with_name("first"))
    assert project.relay("train").status == 0
    (second,) = (file for file in files(project) if file.name != "first")
    assert {step for step, tag, _ in scalars(second) if tag == "loss"} == {2}
    assert starts(second) == [2]


def test_none_are_written_unasked(encoded: Callable[..., Project]) -> None:
    project = encoded(train={"steps": 1}, previews={"every": 0, "prompts": ["a blue dog"]})
    assert project.relay("train").status == 0
    assert not (project.run / "tensorboard").exists()


def test_without_the_extra_it_is_refused(encoded: Callable[..., Project], monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(log={"tensorboard": True})
    for name in ("tensorboardX", "tensorboardX.event_file_writer", "tensorboardX.proto"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = project.relay("train")
    assert outcome.status == 2
    assert "flux2-relay[tensorboard]" in outcome.said
    assert not (project.run / "metrics.jsonl").exists()
