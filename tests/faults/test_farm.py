"""Several processes of stage one over one store, some of them killed; and a store that goes to another machine."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import model
from tiny.project import Project, relay

from flux2_relay import cache
from flux2_relay.cache.audit import verify
from flux2_relay.stages.encode.sharing import Shard

TIMEOUT = 120  # seconds until a hanging process fails the test
PICTURES = 24
SLOW = """
import sys, time
from flux2_relay import cache
from flux2_relay.pipeline import cli

log, publish = open(sys.argv.pop(1), "a"), cache.Store.publish

def slowly(self, *arguments):
    publish(self, *arguments)
    print(arguments[0], file=log, flush=True)
    time.sleep(0.3)

cache.Store.publish = slowly
cli.main()
"""
"""A worker that is sure to be at work when it is killed."""


@pytest.fixture(autouse=True)
def _plain(_uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


def start(project: Project, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
    """A worker; with a log a slow one, which says there what it has put into the store."""
    command = ["-m", "flux2_relay.pipeline.cli"] if log is None else ["-c", SLOW, str(log)]
    command = [sys.executable, *command, "encode", "-c", str(project.config), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(worker: subprocess.Popen[str], log: Path, entries: int) -> None:
    """End a worker without warning after so many entries of its own."""
    deadline = time.monotonic() + TIMEOUT
    while not log.exists() or log.read_text().count("\n") < entries:
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL


def test_killed_workers_stop_no_other_and_the_set_completes(
    encoded: Callable[..., Project], dev: Path, tmp_path: Path
) -> None:
    """Two shards and one that takes whatever is missing; the first shard and the third die at some moment."""
    data = model.write_pictures(tmp_path / "data", PICTURES)
    for file in data.glob("*.txt"):
        file.write_text("a red fox number 1")  # is in the store: no worker needs the text encoder, slow to import
    project, dice = Project(encoded().folder, dev, data).write(), random.Random(5)
    logs = [tmp_path / "first.log", tmp_path / "free.log"]
    slow = [start(project, "--shard", "1/2", log=logs[0]), start(project, log=logs[1])]
    steady = start(project, "--shard", "2/2")
    for worker, log in zip(slow, logs, strict=True):
        kill(worker, log, dice.randrange(1, 5))
    said, _ = steady.communicate(timeout=TIMEOUT)
    assert steady.returncode == 0, said
    store = cache.open(project.store)
    record = store.sets()[0]
    missing = store.missing(record, patient=False)
    assert missing
    assert Shard(2, 2).of(missing) == {}
    outcome = project.relay("encode", "--shard", "1/2")
    assert outcome.status == 0, outcome.said
    assert store.missing(record, patient=False) == {}
    found = verify(store)
    assert (found.faults, found.missing) == ((), {})
    assert len(store.keys("latents")) == PICTURES


def test_a_pushed_store_trains_where_nothing_else_is(
    encoded: Callable[..., Project], dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = encoded()
    assert here.relay("train").status == 0
    adapter = mx.load(str(here.run / "adapter.safetensors"))
    assert isinstance(adapter, dict)
    mx.eval(adapter)
    there = tmp_path / "there"
    outcome = relay("cache", "push", "-c", here.config, there / "store.zarr")
    assert outcome.status == 0, outcome.said
    shutil.rmtree(here.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(there / "memory"))  # nothing that was hashed here is known there
    for part in ("transformer", "model_index.json"):  # neither text encoder nor tokenizer nor VAE
        copy = shutil.copytree if (dev / part).is_dir() else shutil.copy
        (there / dev.name).mkdir(exist_ok=True)
        copy(dev / part, there / dev.name / part)
    project = Project(there, there / dev.name, there / here.data.name).write()
    assert sorted(path.name for path in there.iterdir() if path.is_dir()) == [dev.name, "store.zarr"]
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    values = mx.load(str(project.run / "adapter.safetensors"))
    assert isinstance(values, dict)
    assert values.keys() == adapter.keys()
    assert all(bool(mx.array_equal(values[name], adapter[name])) for name in adapter)


def test_shards_fill_a_bucket_and_a_machine_that_has_the_transformer_alone_trains_from_it(
    encoded: Callable[..., Project], dev: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, place = encoded(), f"--set=cache.path={url}"
    for shard in ("1/2", "2/2"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / shard.replace("/", "of")))  # a machine of its own
        outcome = here.relay("encode", "--shard", shard, place)
        assert outcome.status == 0, outcome.said
    assert here.relay("train", place).status == 0
    store = cache.open(url)
    assert store.missing(store.sets()[0], patient=False) == {}
    assert (verify(store).faults, verify(store).missing) == ((), {})
    there = tmp_path / "there"
    shutil.copytree(dev / "transformer", there / dev.name / "transformer")
    shutil.copy(dev / "model_index.json", there / dev.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(there / "memory"))
    project = Project(there, there / dev.name, there / here.data.name).write()
    outcome = project.relay("train", place)
    assert outcome.status == 0, outcome.said
    values, expected = (mx.load(str(of.run / "adapter.safetensors")) for of in (project, here))
    assert isinstance(values, dict)
    assert isinstance(expected, dict)
    assert values.keys() == expected.keys()
    assert all(bool(mx.array_equal(values[name], expected[name])) for name in expected)
