"""What goes wrong under way, and what the user asks for under way: skipped, said, saved, gone on from."""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from tiny.project import Project

from flux2_relay.cache import durable
from flux2_relay.pipeline.run_folder import RunFolder
from flux2_relay.stages import files
from flux2_relay.stages.train import checkpoint, previews, running, step

QUIET = {"previews": {"every": 0, "prompts": ["a blue dog"]}}


def lines(project: Project, name: str = "metrics.jsonl") -> list[dict]:
    """Strictly JSON: no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in (project.run / name).read_text().splitlines()]


def steps(project: Project) -> list[str]:
    return [path.name for path in checkpoint.saved(project.run / "checkpoints")]


def tensors(path: Path) -> dict[str, mx.array]:
    values = mx.load(str(path))
    assert isinstance(values, dict)
    return values


# Losses and gradients that are not finite


def breaking(monkeypatch: pytest.MonkeyPatch, bad: set[int], of: str) -> None:
    """Make the loss or a gradient of these steps (from 1) not finite."""
    real = step._pass

    def gone_bad(asked, number, means):
        yield from real(asked, number, means)
        (one,), (mean,) = asked, means
        if one.loaded.step + 1 in bad and of == "loss":
            mean.losses[-1] *= mx.inf
        if one.loaded.step + 1 in bad and of == "gradient":
            mean.sums = {name: value * mx.nan for name, value in mean.sums.items()}

    monkeypatch.setattr(step, "_pass", gone_bad)


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(encoded: Callable, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    project = encoded(**QUIET, save={"every": 1, "keep": 9})
    breaking(monkeypatch, {3}, of)
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert "step 3: " in outcome.said
    assert "the step was skipped" in outcome.said
    assert ".png" in outcome.said
    found = lines(project)
    assert [line["step"] for line in found] == list(range(1, 7))
    assert [line["loss"] is None for line in found] == [n == 3 for n in range(1, 7)]
    assert [line["grad_norm"] is None for line in found] == [n == 3 for n in range(1, 7)]
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        before, after, later = (tensors(project.run / f"checkpoints/00000{n}/{name}") for n in (2, 3, 4))
        assert all(mx.array_equal(before[key], after[key]) for key in before)
        assert not all(mx.array_equal(before[key], later[key]) for key in before)


def test_five_in_a_row_stop_the_run(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(**QUIET, train={"steps": 9}, save={"every": 2, "keep": 9})
    with monkeypatch.context() as patch:
        breaking(patch, {2, *range(4, 9)}, "loss")
        outcome = project.relay("train")
    assert outcome.status == 1
    (said,) = (line for line in outcome.said.splitlines() if "5th such step in a row" in line)
    assert "step 8: loss inf" in said
    assert ".png" in said, "the batch is named"
    assert "the checkpoint of step 6" in said
    assert not (project.run / "adapter.safetensors").exists()
    assert project.relay("train").status == 0
    assert [line["loss"] is None for line in lines(project)] == [n in (2, 4, 5, 6) for n in range(1, 10)]


def test_the_count_of_skipped_steps_outlives_the_process(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(**QUIET, train={"steps": 9})
    breaking(monkeypatch, set(range(2, 10)), "loss")
    assert project.relay("train", "--max-steps", 4).status == 0
    outcome = project.relay("train")
    assert outcome.status == 1
    assert len(lines(project)) == 6, "three before, two behind"


def test_every_pass_of_the_batch_is_named(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(**QUIET, train={"steps": 2, "batch": 1, "accumulate": 2})
    breaking(monkeypatch, {1}, "loss")
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    (said,) = (line for line in outcome.said.splitlines() if "the step was skipped" in line)
    assert len(set(re.findall(r"\w+\.png", said))) == 2, said


# Wishes


class Asking:
    """Makes a file in the run folder once a step is done."""

    def __init__(self, project: Project, monkeypatch: pytest.MonkeyPatch, wishes: dict[int, str]) -> None:
        real = running.Run.step

        def with_wishes(run: running.Run, loaded):
            result = real(run, loaded)
            if run.done in wishes:
                (project.run / wishes[run.done]).touch()
            return result

        monkeypatch.setattr(running.Run, "step", with_wishes)


def test_a_file_asks_for_a_checkpoint(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(**QUIET, save={"every": 99, "keep": 9})
    Asking(project, monkeypatch, {2: ".save", 5: ".save"})
    assert project.relay("train").status == 0
    assert steps(project) == ["000002", "000005", "000006"]
    assert not (project.run / ".save").exists()


def test_a_file_stops_the_run(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(**QUIET, save={"every": 99})
    with monkeypatch.context() as patch:
        Asking(project, patch, {3: ".stop"})
        outcome = project.relay("train")
    assert outcome.status == 0
    assert "3 of 6 steps done" in outcome.said
    assert steps(project) == ["000003"]
    assert not (project.run / ".stop").exists()
    assert project.relay("train").status == 0
    assert len(lines(project)) == 6


# A full disk


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def cut_off(path: str, *_: object) -> None:
    """As MLX fails on a full disk."""
    Path(path).write_bytes(b"half of it")
    raise RuntimeError("[write] Unable to write 380092 bytes to file.")


FULL = {
    "tensors": (files.mx, "save_safetensors", cut_off),
    "state": (durable, "write_and_sync", no_room),
    "name": (checkpoint.os, "rename", no_room),
}


@pytest.fixture(params=FULL)
def full(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the disk full for the checkpoint of one step, at one of the points where it shows."""
    real = checkpoint.save

    def fill(at: int) -> None:
        def save(folder: Path, whole: checkpoint.Checkpoint, keep: int) -> Path:
            with pytest.MonkeyPatch.context() as patch:
                if whole.state.step == at:
                    patch.setattr(*FULL[request.param])
                return real(folder, whole, keep)

        monkeypatch.setattr(checkpoint, "save", save)

    return fill


def test_a_checkpoint_that_does_not_fit_is_left_out(encoded: Callable, full: Callable) -> None:
    project = encoded(**QUIET, save={"every": 2, "keep": 9})
    full(4)
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert "checkpoint of step 4 could not be written" in outcome.said
    assert "goes on from the checkpoint of step 2" in outcome.said
    assert sorted(path.name for path in (project.run / "checkpoints").iterdir()) == ["000002", "000006"]


def test_a_run_whose_last_checkpoint_does_not_fit_says_so(encoded: Callable, full: Callable) -> None:
    project = encoded(**QUIET, save={"every": 4})
    full(6)
    outcome = project.relay("train")
    assert outcome.status == 1
    assert "the last checkpoint could not be written" in outcome.said
    assert str(project.run) in outcome.said
    assert "goes on from the checkpoint of step 4" in outcome.said


def test_an_adapter_that_does_not_fit_is_no_finished_run(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded(**QUIET)

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_finished", no_room)
        outcome = project.relay("train")
    assert outcome.status == 1
    assert "the adapter could not be written" in outcome.said
    assert "No space left" in outcome.said
    assert project.relay("train").status == 0
    assert (project.run / "adapter.safetensors").exists()


def test_previews_that_do_not_fit_are_left_out(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded()

    monkeypatch.setattr(previews, "write_tensors", no_room)
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert "the previews of step 0 could not be written" in outcome.said


def test_metrics_that_do_not_fit_end_the_run_in_plain_words(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project, real = encoded(**QUIET), RunFolder.write

    def write(run: RunFolder, line: dict) -> None:
        if line["step"] == 4:
            with open(run.metrics, "a") as file:
                file.write('{"step": 4, "lo')
            no_room()
        real(run, line)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", write)
        outcome = project.relay("train")
    assert outcome.status == 1
    assert "No space left on device" in outcome.said
    assert "the next start goes on from the checkpoint of step 2" in outcome.said
    assert project.relay("train").status == 0
    assert [line["step"] for line in lines(project)] == list(range(1, 7))


# A device that fails

TOLD = {
    "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallback"
    "ErrorImpactingInteractivity)": "display",
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackError"
    "OutOfMemory)": "memory.budget",
    "[malloc_or_wait] Unable to allocate 12884901888 bytes.": "memory.budget",
    "[metal::malloc] Resource limit (499000) exceeded.": "fewer shapes",
    "cudaMallocAsync(&ptr, size, stream) failed: out of memory": "memory.budget",
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPU…)": "waited too long",
}


@pytest.mark.parametrize("text", TOLD, ids=[text[:24] for text in TOLD])
def test_an_error_of_the_device_is_explained(encoded: Callable, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    project, real = encoded(**QUIET), step._pass

    def failing(asked, number, means):
        if asked[0].loaded.step == 3:
            raise RuntimeError(text)
        return real(asked, number, means)

    with monkeypatch.context() as patch:
        patch.setattr(step, "_pass", failing)
        outcome = project.relay("train")
    assert outcome.status == 1
    assert TOLD[text] in outcome.said
    assert text in outcome.said
    assert "Traceback" not in outcome.said
    assert "the next start goes on from the checkpoint of step 2" in outcome.said
    assert steps(project) == ["000002"]  # what came after the last good one is suspect
    assert project.relay("train").status == 0


def test_a_fault_of_ours_is_not_taken_for_the_devices(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("[matmul] Last dimension of first input with shape (2,3)")

    monkeypatch.setattr(step, "_pass", failing)
    with pytest.raises(RuntimeError, match="matmul"):
        encoded(**QUIET).relay("train")
