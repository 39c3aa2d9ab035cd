"""Two ranks over ring on this machine: equal to one process that accumulates, and lost ones end all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from tiny.project import Project

TIMEOUT = 120  # seconds until a hanging process fails the test
EVERYTHING = {
    "lora": {"dropout": 0.1},
    "validation": {"fraction": 0.3, "every": 2},
    "previews": {"every": 3, "steps": 1},
}


@pytest.fixture(autouse=True)
def _plain(_uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


def ports(count: int) -> int:
    """The first of so many ports in a row that are free."""
    while True:
        held = []
        try:
            for place in range(count):
                held.append(socket.create_server(("127.0.0.1", held[0].getsockname()[1] + place if held else 0)))
            return held[0].getsockname()[1]
        except OSError:
            continue
        finally:
            for one in held:
                one.close()


class Pair:
    """`relay train --hosts` with two ranks on this machine, and what they have printed so far."""

    def __init__(self, project: Project, *arguments: str) -> None:
        hosts = project.folder / "hosts.json"
        hosts.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
        command = [sys.executable, "-m", "flux2_relay.pipeline.cli", "train", "-c", str(project.config), *arguments]
        command += ["--hosts", str(hosts), f"--port={ports(2)}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no ranks behind where a test fails; the command ends them with itself."""
        self.process.terminate()
        self.end()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as printed:
            for line in printed:
                self.said += line

    def pid(self, rank: int) -> int | None:
        found = re.search(rf"rank {rank} of 2 is process (\d+)", self.said)
        return int(found[1]) if found else None

    def end(self) -> tuple[int, str]:
        status = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return status, self.said


def tensors(path: Path) -> dict[str, mx.array]:
    values = mx.load(str(path))
    assert isinstance(values, dict)
    return values


def equal(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(bool(mx.array_equal(first[n], second[n])) for n in first)


def test_two_ranks_are_one_that_accumulates_bit_for_bit_and_either_goes_on_as_the_other(
    encoded: Callable[..., Project],
) -> None:
    train = {"batch": 1, "ema": 0.9}
    alone = encoded(**EVERYTHING, train={**train, "accumulate": 2})
    assert alone.relay("train").status == 0
    project = encoded(**EVERYTHING, train=train)
    with Pair(project, "--max-steps", "3") as pair:
        status, said = pair.end()
    assert status == 0, said
    assert "rank 1 of 2 ended with status 0" in said
    assert said.count("3 of 6 steps done") == 1  # the first rank's alone
    project.write({**EVERYTHING, "train": {**train, "accumulate": 2}})
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert "ranks were 2 and are 1 now (since step 3); a step is of 2 items as before" in outcome.said
    for step in ("000002", "000006"):  # by two ranks, and by one that went on
        for name in ("adapter", "optimizer", "ema"):
            file = f"checkpoints/{step}/{name}.safetensors"
            assert equal(alone.run / file, project.run / file), file
    columns = ("step", "loss", "lr", "grad_norm", "sigma")
    assert project.metrics(*columns) == alone.metrics(*columns)
    assert (project.run / "validation.jsonl").read_text() == (alone.run / "validation.jsonl").read_text()
    names = sorted(path.name for path in (alone.run / "previews").glob("*.safetensors"))
    assert names == sorted(path.name for path in (project.run / "previews").glob("*.safetensors"))
    lines = [json.loads(line) for line in (project.run / "metrics.jsonl").read_text().splitlines()]
    assert ["reduce_seconds" in line for line in lines] == [True] * 3 + [False] * 3


def test_a_lost_rank_ends_all_and_the_run_goes_on_with_one(encoded: Callable[..., Project]) -> None:
    project = encoded(train={"steps": 4000, "batch": 1}, save={"every": 1000}, previews={"every": 0})
    deadline = time.monotonic() + TIMEOUT
    metrics = project.run / "metrics.jsonl"
    with Pair(project) as pair:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3 and pair.pid(1)):
            assert time.monotonic() < deadline, pair.said
            assert pair.process.poll() is None, pair.said
            time.sleep(0.02)
        os.kill(pair.pid(1) or 0, signal.SIGKILL)
        status, said = pair.end()
    assert status == 1, said
    assert "rank 0 of 2 lost another rank" in said
    assert "rank 1 of 2 ended without a word" in said
    assert "Traceback" not in said
    done = len(project.metrics("step"))
    assert f"with any number of ranks the next start goes on from the checkpoint of step {done}" in said
    outcome = project.relay("train", "--max-steps", 1)
    assert outcome.status == 0, outcome.said
    assert "warning: ranks were 2 and are 1 now" in outcome.said
    assert "a step is of 1 items where it was of 2" in outcome.said
    assert f"going on from the checkpoint of step {done}" in outcome.said


EXCHANGE = """
import flux2_relay.stages
import mlx.core as mx
from flux2_relay.cache.errors import InputError
from flux2_relay.stages.train import ranks

group = ranks.open_group(ranks.Waits())
rank = group.rank
for size in (1 << 25, 16):  # in one piece, and in several
    ranks._PIECE = size
    loss, gradients = group.average(mx.array(float(rank)), {"a": mx.ones((3, 2)) * (rank + 1), "b": mx.arange(5.0)})
    print(loss.item(), gradients["a"].tolist(), gradients["b"].tolist())
print(group.any(rank == 1), group.any(False))
values = {"step": mx.array(7 + rank, mx.uint64), "x": mx.array([-0.0, float("nan"), rank])}
print({name: (str(value.dtype), value.shape, value.tolist()) for name, value in group.follow(values).items()})
group.check({"a": "same", "b": "same"})
try:
    group.check({"same": "x", "run.seed": str(rank), "long": "y" * 200})
except InputError as error:
    print(str(error).splitlines()[1:], "here: " + str(rank) in str(error))
print(group.waits.since, group.waits.seconds > 0)
"""


def test_what_ranks_exchange(tmp_path: Path) -> None:
    first = ports(2)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first}"], [f"127.0.0.1:{first + 1}"]]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGE],
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=TIMEOUT)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    mean = "0.5 [[1.5, 1.5], [1.5, 1.5], [1.5, 1.5]] [0.0, 1.0, 2.0, 3.0, 4.0]"
    for rank, lines in enumerate(printed):
        assert lines == [
            mean,
            mean,
            "True False",
            "{'step': ('mlx.core.uint64', (), 7), 'x': ('mlx.core.float32', (3,), [-0.0, nan, 0.0])}",
            f"['  run.seed of rank 1 is another than that of rank 0 (here: {rank})'] True",
            "None True",
        ]
