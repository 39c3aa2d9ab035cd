"""Several processes of stage one over one store, some of them killed; and a store that goes to another machine."""

import os
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
PICTURES = 60


@pytest.fixture(autouse=True)
def _plain(_uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


def start(project: Project, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flux2_relay.pipeline.cli", "encode", "-c", str(project.config), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_workers_stop_no_other_and_the_set_completes(dev: Path, tmp_path: Path) -> None:
    """Two shards and one that takes whatever is missing; the first shard and the third die at some moment."""
    project = Project(tmp_path / "p", dev, model.write_pictures(tmp_path / "data", PICTURES)).write()
    dice = random.Random(5)
    first, second, free = start(project, "--shard", "1/2"), start(project, "--shard", "2/2"), start(project)
    latents, deadline = project.store / "latents", time.monotonic() + TIMEOUT
    for victim in (first, free):
        there = len(os.listdir(latents)) if latents.is_dir() else 0
        enough = there + dice.randrange(1, 8)
        while not (latents.is_dir() and len(os.listdir(latents)) > enough):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
    said = [worker.communicate(timeout=TIMEOUT)[0] for worker in (first, second, free)]
    assert [worker.returncode for worker in (first, second, free)] == [-signal.SIGKILL, 0, -signal.SIGKILL], said
    store = cache.open(project.store)
    (record,) = store.sets()
    mine, others = Shard(2, 2), Shard(1, 2)
    missing = store.missing(record, patient=False)
    assert mine.of(missing) == {}
    assert others.of(missing) == missing
    assert project.relay("encode", "--shard", "1/2").status == 0
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
