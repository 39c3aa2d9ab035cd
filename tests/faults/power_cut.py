"""Cut the power while entries are published, N times; and fill a disk. What was acknowledged must be there, whole.

    python tests/faults/power_cut.py [N]

Needs Linux, root and loop devices; says so and leaves where it has not got them. The power cut is ext4's own: the file
system stops without flushing (its shutdown call, as for testing), is mounted again and judged. Entries published
without fsync go through the same, and must be lost: else the cut was none.
"""

import fcntl
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flux2_relay import cache
from flux2_relay.cache.audit import verify
from flux2_relay.cache.errors import StoreError

WRITER = """
import os, sys
import numpy as np
from flux2_relay import cache

path, log, synced = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT), sys.argv[3] == "1"
if not synced:
    os.fsync = lambda fd: None
store, dice = cache.open(path, "a"), np.random.default_rng(0)
for i in range(100_000):
    array = dice.standard_normal((20, 3000), dtype=np.float32)
    key = store.publish("text", {"kind": "text", "dtype": "float32", "i": i}, array, {})
    os.write(log, f"{key}\\n".encode())
"""
SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN


def run(*command: object) -> None:
    """Run a command that must succeed, quietly."""
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[tuple[Path, Path]]:
    """A new file system in a file -> (the file, where it is mounted)."""
    image, place = folder / "image", folder / "disk"
    with open(image, "wb") as file:
        file.truncate(megabytes << 20)
    place.mkdir(exist_ok=True)
    run("mkfs.ext4", "-q", "-F", image)
    run("mount", "-o", "loop,commit=1", image, place)
    try:
        yield image, place
    finally:
        run("umount", place)
        image.unlink()


def start(store: Path, log: Path, synced: bool) -> subprocess.Popen:
    """Publish in a process of its own until something happens; acknowledged keys go into `log`."""
    command = [sys.executable, "-c", WRITER, str(store), str(log), str(int(synced))]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def acknowledged(log: Path) -> set[str]:
    """The keys whose `publish` has returned."""
    return set(log.read_text().split()) if log.exists() else set()


def judge(store: Path, keys: set[str]) -> tuple[int, int]:
    """How many of the acknowledged entries are not there, and how many of those there are damaged."""
    try:
        opened = cache.open(store)
    except StoreError:
        return len(keys), 0
    return len(keys - opened.keys("text")), len(verify(opened).faults)


def cut(folder: Path, synced: bool, seconds: float) -> tuple[int, int, int]:
    """Cut the power `seconds` after the first entries -> acknowledged, lost, damaged."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    with disk(folder, 512) as (image, place):
        store = place / "store.zarr"
        with start(store, log, synced) as process:
            while process.poll() is None and len(acknowledged(log)) < 3:
                time.sleep(0.01)
            time.sleep(seconds)
            fd = os.open(place, os.O_RDONLY)
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
            os.close(fd)
            process.kill()
            process.communicate()
        keys = acknowledged(log)
        run("umount", place)
        run("mount", "-o", "loop", image, place)
        return len(keys), *judge(store, keys)


def fill(folder: Path) -> tuple[int, int, int, str]:
    """Publish until the disk is full -> acknowledged, lost, damaged, and what was said."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    with disk(folder, 48) as (_, place):
        store = place / "store.zarr"
        with start(store, log, True) as process:
            said = process.communicate()[1].decode().strip().splitlines()[-1]
        keys = acknowledged(log)
        left = [path.name for path in (store / "tmp").iterdir() if path.name != "zarr.json"]
        lost, damaged = judge(store, keys)
        return len(keys), lost, damaged + len(left), said


def main(trials: int) -> None:
    """All of it; exits with 1 when something was lost."""
    dice, with_sync, without = random.Random(0), [0, 0, 0], [0, 0, 0]
    with tempfile.TemporaryDirectory(prefix="power-cut-") as scratch:
        folder = Path(scratch)
        try:
            with disk(folder, 16):
                pass
        except (OSError, subprocess.CalledProcessError):
            print("power cuts were not tried: they need Linux, root and loop devices")
            return
        for number in range(trials):
            for synced, total in ((True, with_sync), (False, without)):
                found = cut(folder, synced, dice.uniform(0.1, 1.5))
                total[:] = [a + b for a, b in zip(total, found, strict=True)]
            print(f"{number + 1} power cuts: {with_sync[0]} acknowledged, {with_sync[1]} lost, {with_sync[2]} damaged; "
                  f"without fsync {without[0]}, {without[1]} lost, {without[2]} damaged", flush=True)  # fmt: skip
        full = fill(folder)
    print(f"disk full: {full[0]} acknowledged, {full[1]} lost, {full[2]} damaged or left over; it said: {full[3]}")
    if any(with_sync[1:]) or any(full[1:3]):
        raise SystemExit("acknowledged entries were lost")
    if not any(without[1:]):
        raise SystemExit("nothing was lost without fsync either: these were no power cuts")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
