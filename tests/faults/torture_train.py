"""Kill `relay train` at random moments, N times, with everything on; the end must be that of a run nobody killed.

    python tests/faults/torture_train.py [N] [SEED]

Everything is: accumulation, clipping, warm-up, dropout of captions and in adapters, a mean of the adapter, held-out
pictures, previews, few checkpoints, and one optimizer after the other. Some kills find it loading, most find it
training or writing. All tensors and the lines of metrics are compared bit for bit. Prints what it did and exits with 1
at the first difference.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny.project import Project

from flux2_relay.stages.files import read_tensors

RULES = {"adamw": 0.01, "adafactor": 0.01, "lion": 0.003, "prodigy": 1.0}
"""Optimizers, and a learning rate for each."""
COLUMNS = ("step", "loss", "lr", "grad_norm", "sigma")
STEPS = 24
TIMEOUT = 300  # seconds until a hanging process counts as failed


def everything(rule: str) -> dict[str, dict[str, object]]:
    """Changes to the tiny config: all that a run can have to remember."""
    return {
        "lora": {"rank": 2, "targets": "blocks", "dropout": 0.3, "ranks": {"to_q": 3}},
        "train": {
            "optimizer": rule,
            "lr": RULES[rule],
            "steps": STEPS,
            "batch": 1,
            "accumulate": 2,
            "schedule": "cosine",
            "warmup": 3,
            "clip": 0.5,
            "ema": 0.9,
            "caption_dropout": 0.3,
            "weighting": "bell",
        },
        "validation": {"fraction": 0.2, "every": 4},
        "save": {"every": 3, "keep": 2, "dtype": "float32"},
        "previews": {"every": 8, "prompts": ["a blue dog"], "size": [64, 64], "steps": 2},
    }


def start(project: Project) -> subprocess.Popen:
    """Train in a process of its own."""
    command = [sys.executable, "-m", "flux2_relay.pipeline.cli", "train", "-c", str(project.config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> str:
    """Wait for it -> what it complained of."""
    return process.communicate(timeout=TIMEOUT)[1]


def lines(project: Project) -> int:
    """Steps that the metrics tell of."""
    file = project.run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_once(project: Project, dice: random.Random) -> bool:
    """Start, wait for the first step of this process and a moment more, or not even that; kill -> was it in time?"""
    early, pause = dice.random() < 0.15, dice.uniform(0, 0.15)
    process = start(project)
    if early:
        time.sleep(dice.uniform(0, 2))
    else:
        file = project.run / "metrics.jsonl"
        before = file.stat().st_mtime_ns if file.exists() else 0
        while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(pause)
    process.kill()
    complaint = end(process)
    if process.returncode not in (0, -9):
        raise SystemExit(f"train failed by itself with {process.returncode}:\n{complaint}")
    return process.returncode == -9


def kill_behind_a_checkpoint(project: Project) -> None:
    """Start, and kill as soon as there is a checkpoint to go on from."""
    process = start(project)
    while process.poll() is None and not list((project.run / "checkpoints").glob("[0-9]*")):
        time.sleep(0.001)
    process.kill()
    complaint = end(process)
    if process.returncode != -9:
        raise SystemExit(f"train ended with {process.returncode}:\n{complaint}")


def finish(project: Project) -> None:
    """Let it train to the end."""
    process = start(project)
    complaint = end(process)
    if process.returncode:
        raise SystemExit(f"train failed by itself with {process.returncode}:\n{complaint}")


def differences(one: Project, other: Project) -> list[str]:
    """What of two finished runs is not the same: tensors of every file, metrics, held-out losses, marks, leftovers."""
    found = [name for name in ("validation.jsonl", "checkpoints/best") if _bytes(one, name) != _bytes(other, name)]
    found += ["metrics.jsonl"] if one.metrics(*COLUMNS) != other.metrics(*COLUMNS) else []
    files = {path.relative_to(p.run).as_posix() for p in (one, other) for path in p.run.rglob("*.safetensors")}
    for name in sorted(files):
        if not all((p.run / name).exists() for p in (one, other)):
            found.append(f"{name} is there once")
            continue
        values, expected = (read_tensors(p.run / name)[0] for p in (one, other))
        same = values.keys() == expected.keys() and all(bytes(values[k]) == bytes(expected[k]) for k in expected)
        found += [] if same else [name]
    return found


def _bytes(project: Project, name: str) -> bytes:
    return (project.run / name).read_bytes()


def torture(folder: Path, kills: int, dice: random.Random) -> None:
    """The whole of it: every rule in turn, until there were `kills` kills."""
    from tiny import model

    checkpoint, data = model.write_dev(folder / "model"), model.write_pictures(folder / "data", 8)
    killed = rounds = 0
    while killed < kills:
        rule = list(RULES)[rounds % len(RULES)]
        whole, broken = (Project(folder / f"{rounds}{name}", checkpoint, data) for name in ("whole", "broken"))
        for project in (whole, broken):
            project.write(everything(rule))
            outcome = project.relay("encode")
            if outcome.status:
                raise SystemExit(outcome.said)
        finish(whole)
        in_time = True
        of_round = dice.randint(3, 8)
        while in_time and of_round and killed < kills:
            in_time = kill_once(broken, dice)
            killed, of_round = killed + in_time, of_round - 1
        finish(broken)
        if wrong := differences(broken, whole):
            raise SystemExit(f"{rule}: {len(wrong)} things differ from the unbroken run, among them {wrong[0]}")
        rounds += 1
        counted = json.dumps({"kills": killed, "runs": rounds, "optimizer": rule})
        print(f"{counted}: equal, bit for bit", flush=True)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    chosen = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    print(f"{count} kills, seed {chosen}")
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "MLX_DISABLE_COMPILE": "1"}
    with tempfile.TemporaryDirectory(prefix="torture-train-") as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "user")
        torture(Path(scratch), count, random.Random(chosen))
