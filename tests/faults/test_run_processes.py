"""Training and encoding as processes: killed, terminated, interrupted, and started again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny.project import Project

from flux2_relay import cache

LONG = {"train": {"steps": 4000}, "save": {"every": 5, "keep": 2}, "previews": {"every": 0}}
TIMEOUT = 120  # seconds until a hanging process fails the test


@pytest.fixture(autouse=True)
def _plain(_uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


def start(project: Project, command: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "flux2_relay.pipeline.cli", command, "-c", str(project.config)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, said


def wait_until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    """Wait for something that the process does; fail if it ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not is_so():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the process ended before that: {finish(process)[1]}")
        time.sleep(0.002)


def steps(project: Project) -> int:
    metrics = project.run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(
    encoded: Callable[..., Project], number: signal.Signals, status: int
) -> None:
    project = encoded(**LONG)
    process = start(project, "train")
    wait_until(process, lambda: steps(project) >= 6)
    process.send_signal(number)
    found, said = finish(process)
    assert found == status, said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    done = steps(project)
    newest = sorted(path.name for path in (project.run / "checkpoints").iterdir())[-1]
    assert int(newest) == done
    assert (project.run / "adapter.safetensors").exists()
    outcome = project.relay("train", "--max-steps", 1)
    assert outcome.status == 0
    assert f"going on from the checkpoint of step {done}" in outcome.said


def test_a_signal_while_encoding_keeps_what_is_committed(dev: Path, tmp_path: Path) -> None:
    from tiny import model

    data = model.write_pictures(tmp_path / "data", 60)
    project = Project(tmp_path / "p", dev, data).write()
    process = start(project, "encode")
    latents = project.store / "latents"
    wait_until(process, lambda: latents.is_dir() and len(os.listdir(latents)) > 3)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 143, said
    assert "everything committed so far is kept" in said
    store = cache.open(project.store)
    (record,) = store.sets()
    before = store.keys("latents")
    assert all(store.examine("latents", key) is None for key in before)
    assert 3 <= len(before) < 60
    assert set(store.missing(record, patient=False)) == {"latents"}
    outcome = project.relay("encode")
    assert outcome.status == 0
    assert f"encoded 0 captions and {60 - len(before)} images" in outcome.said


def test_killed_while_encoding_nothing_is_half_there(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    with start(project, "encode") as process:
        text = project.store / "text"
        wait_until(process, lambda: text.is_dir() and len(os.listdir(text)) > 2)
        process.kill()
    store = cache.open(project.store)
    assert all(store.examine(kind, key) is None for kind in ("text", "latents") for key in store.keys(kind))
    assert project.relay("encode").status == 0
    assert project.relay("train", "--max-steps", 1).status == 0


def test_two_processes_encode_into_one_store(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    outcomes = [finish(process) for process in (start(project, "encode"), start(project, "encode"))]
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    store = cache.open(project.store)
    (record,) = store.sets()
    assert store.missing(record) == {}
    found = [re.search(r"encoded (\d+) captions and (\d+) images", said) for _, said in outcomes]
    made = [tuple(map(int, each.groups())) for each in found if each]
    assert tuple(map(sum, zip(*made, strict=True))) == (7, 5), "nothing is made twice"


def test_a_damaged_entry_stops_training_by_name_and_is_mended(encoded: Callable[..., Project]) -> None:
    project = encoded()
    key = next(iter(cache.open(project.store).keys("latents")))
    (chunk,) = (project.store / "latents" / key).glob("c.*")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0xFF
    chunk.write_bytes(data)
    outcome = project.relay("train")
    assert outcome.status == 2
    assert key in outcome.said
    assert "relay encode" in outcome.said
    shutil.rmtree(project.store / "latents" / key)
    assert project.relay("encode").status == 0
    assert project.relay("train").status == 0
    assert len(project.metrics("step")) == 6
