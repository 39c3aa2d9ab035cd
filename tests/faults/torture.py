"""Kill `relay encode` at random moments, N times; what it acknowledged must be there, whole, every time.

    python tests/faults/torture.py [N] [SEED]

At the end the store must hold what an unbroken run leaves, byte for byte: same folders, same chunks, same zarr.json
except for `made`, which says when an entry was made. Prints what it did and exits with 1 at the first thing lost.
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

CHILD = """
import os, sys
from flux2_relay import cache
from flux2_relay.pipeline import cli

log, publish = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT), cache.Store.publish

def acknowledged(self, kind, *rest):
    key = publish(self, kind, *rest)
    os.write(log, f"{kind}/{key}\\n".encode())  # the encoder has been told that it is safe
    return key

cache.Store.publish = acknowledged
cli.main()
"""
PICTURES = 120
LONGEST_SECONDS = 0.12  # from the first entry of a run to its end: some kills find it loading, some writing


def start(config: Path, log: Path) -> subprocess.Popen:
    """Encode in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(log), "encode", "-c", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines(log: Path) -> list[str]:
    """What has been acknowledged."""
    return log.read_text().splitlines() if log.exists() else []


def kill_once(config: Path, log: Path, dice: random.Random) -> bool:
    """Start, wait for an entry (or not even that), kill -> was it killed before it was done?"""
    before, pause = len(lines(log)), dice.uniform(0, LONGEST_SECONDS)
    early = dice.random() < 0.1
    with start(config, log) as process:
        if early:
            time.sleep(dice.uniform(0, 2))
        else:
            while process.poll() is None and len(lines(log)) == before:
                time.sleep(0.001)
            time.sleep(pause)
        process.kill()
        error = process.communicate()[1].decode()
    if process.returncode not in (0, -9):
        raise SystemExit(f"encode failed by itself with {process.returncode}:\n{error}")
    return process.returncode == -9


def check(store_path: Path, acknowledged: set[str]) -> int:
    """Every acknowledged entry is there, and everything that is there is whole -> how many there are."""
    from flux2_relay import cache
    from flux2_relay.cache.audit import verify

    if not store_path.exists():
        if acknowledged:
            raise SystemExit(f"the store is gone with {len(acknowledged)} acknowledged entries")
        return 0
    store = cache.open(store_path)
    there = {f"{kind}/{key}" for kind in ("text", "latents", "masks") for key in store.keys(kind)}
    if lost := acknowledged - there:
        raise SystemExit(f"{len(lost)} acknowledged entries are lost, among them {min(lost)}")
    if faults := verify(store).faults:
        raise SystemExit(f"{len(faults)} entries are torn, among them {faults[0]}")
    return len(there)


def content(store: Path) -> dict[str, object]:
    """Every file of a store that counts: bytes of chunks, metadata without `made`."""
    found: dict[str, object] = {}
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        if path.is_file() and (not name.startswith("tmp/") or name == "tmp/zarr.json"):
            found[name] = _without_made(path) if path.name == "zarr.json" else path.read_bytes()
    return found


def _without_made(path: Path) -> object:
    metadata = json.loads(path.read_bytes())
    for told in (metadata["attributes"], metadata["attributes"].get("flux2_relay", {})):
        told.pop("made", None)
    return metadata


def torture(folder: Path, kills: int, seed: int) -> None:
    """The whole of it."""
    from tiny import model

    dice = random.Random(seed)
    checkpoint, data = model.write_dev(folder / "model"), model.write_pictures(folder / "data", PICTURES)
    # A caption a pass: products of other shapes may differ in the last bit, and a resumed run makes other batches.
    changes = {"encode": {"bits": 32, "batch_tokens": 1}, "data": {"path": str(data), "resolutions": [32]}}
    configs = {}
    for name in ("unbroken", "killed"):
        (folder / name).mkdir()
        configs[name] = model.write_config(folder / name / "config.yaml", checkpoint, data, changes)
    started = time.monotonic()
    with start(configs["unbroken"], folder / "unbroken/log") as process:
        error = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"the unbroken run failed:\n{error}")
    print(f"unbroken: {check(folder / 'unbroken/store.zarr', set())} entries in {time.monotonic() - started:.1f} s")
    killed = rounds = leftovers = 0
    store, log, expected = folder / "killed/store.zarr", folder / "killed/log", content(folder / "unbroken/store.zarr")
    while killed < kills:
        was_killed = kill_once(configs["killed"], log, dice)
        there = check(store, set(lines(log)))
        killed += was_killed
        if killed % 10 == 0 and was_killed:
            print(f"{killed} kills, {there} entries there, {len(set(lines(log)))} acknowledged", flush=True)
        if not was_killed or killed == kills:
            leftovers += _finish(configs["killed"], store, log, expected)
            rounds += 1
    print(f"{killed} kills over {rounds} stores: nothing lost, nothing torn, {leftovers} leftovers in tmp; equal")


def _finish(config: Path, store: Path, log: Path, expected: dict[str, object]) -> int:
    """Let encode finish, compare with the unbroken store, and begin anew -> what lay in tmp."""
    with start(config, log) as process:
        process.communicate()
    check(store, set(lines(log)))
    found = content(store)
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise SystemExit(f"{len(wrong)} files differ from those of the unbroken store, among them {wrong[0]}")
    leftovers = len(list((store / "tmp").iterdir())) - 1
    store.rename(store.with_name(f"done{log.stat().st_size}-{time.monotonic_ns()}"))
    log.unlink()
    return leftovers


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    chosen = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    print(f"{count} kills, seed {chosen}")
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "user")
        torture(Path(scratch), count, chosen)
