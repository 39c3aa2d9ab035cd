"""What the store costs, against plain safetensors files in the same run: `python tests/bench/bench_store.py [ENTRIES]`.

Prints each figure beside its aim; asserts nothing, since times depend on the machine and on who else is using it.
Cold means that the files' pages were given back to the kernel (posix_fadvise) just before.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import load, save

import flux2_relay.stages  # noqa: F401 - loads a BLAS before MLX
from flux2_relay import cache
from flux2_relay.cache import encoding
from flux2_relay.cache.audit import mend, verify
from flux2_relay.cache.keys import key_of
from flux2_relay.stages.train.batches import Batches, load_ahead
from flux2_relay.stages.train.contexts import Contexts
from flux2_relay.stages.train.options import TrainOptions

CAPTION, LATENTS = (60, 15360), (64, 64, 128)  # a caption of FLUX.2-dev; a picture of 1024 x 1024
STEP_SECONDS = 0.05


def caption(seed: int) -> np.ndarray:
    """Bits of bfloat16 rows [60, 15360]; about as compressible as real hidden states."""
    dice = np.random.default_rng(seed)
    rows = dice.standard_normal(CAPTION, dtype=np.float32) * np.exp2(dice.integers(-2, 3, CAPTION[1]), dtype=np.float32)
    return (rows.view(np.uint32) >> 16).astype(np.uint16)


def latents(seed: int) -> np.ndarray:
    """Latents [64, 64, 128] float16."""
    return np.random.default_rng(seed).standard_normal(LATENTS).astype(np.float16)


def text_key(number: int) -> dict[str, object]:
    """A key object of a caption."""
    return {"kind": "text", "dtype": "bfloat16", "caption": f"number {number}", "max_length": 512}


def latents_key(number: int) -> dict[str, object]:
    """A key object of latents."""
    return {"kind": "latents", "i": number}


def sample(number: int, text: str, picture: str) -> dict[str, object]:
    """A sample as a set lists it."""
    of_picture = {"key": picture, "h": 64, "w": 64, "references": [], "mask": None}
    return {"id": f"{number}.png", "text": [text], "latents": [of_picture], "repeats": 1, "prior": False}


def median_ms(times: list[float]) -> float:
    """The median in milliseconds."""
    return 1e3 * statistics.median(times)


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def say(what: str, value: str, aim: str) -> None:
    """One figure."""
    print(f"{what:58} {value:>24}   aim {aim}", flush=True)


def write_durably(path: Path, data: bytes) -> None:
    """What a careful program does with a safetensors file: temp, fsync, rename, fsync of the folder."""
    aside = path.with_suffix(".part")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def forget(*folders: Path) -> None:
    """Give the pages of these folders' files back, so that the next read is cold."""
    for folder in folders:
        for path in folder.rglob("*") if folder.is_dir() else [folder]:
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def commits(store: cache.Store, plain: Path, count: int) -> None:
    """Commit captions and latents in turn with writing the same arrays as safetensors."""
    ours, theirs = [], []
    for number in range(count):
        rows, picture = caption(number), latents(number)
        ours.append(timed(lambda rows=rows, n=number: store.publish("text", text_key(n), rows, {})))
        theirs.append(timed(lambda rows=rows, n=number: write_durably(plain / f"text{n}", save({"x": rows}))))
        store.publish("latents", latents_key(number), picture, {})
        write_durably(plain / f"latents{number}", save({"x": picture}))
    ratio = median_ms(ours) / median_ms(theirs)
    say("commit of a caption, against safetensors, durable", f"{median_ms(ours):.1f} / {median_ms(theirs):.1f} ms", "")
    say("  ratio", f"{ratio:.2f} x", "4 x at most")


def batches_of_four(store: cache.Store, plain: Path, count: int, rounds: int = 15) -> None:
    """Read 4 captions and 4 latents at random, cold, one thread; then as the loader does, in four."""
    dice, ours, threaded, theirs = np.random.default_rng(0), [], [], []
    names = [("text", text_key), ("latents", latents_key)]

    def read(entry: tuple[str, str]) -> object:
        return store.read(*entry).array

    with ThreadPoolExecutor(4) as pool:
        for _ in range(rounds):
            chosen = dice.choice(count, 4, replace=False)
            entries = [(kind, key_of(key(int(n)))) for kind, key in names for n in chosen]
            files = [plain / f"{kind}{n}" for kind, _ in names for n in chosen]
            forget(*files, *(store.path / kind / key for kind, key in entries))
            theirs.append(timed(lambda files=files: [load(path.read_bytes())["x"] for path in files]))
            ours.append(timed(lambda entries=entries: list(map(read, entries))))
            forget(*(store.path / kind / key for kind, key in entries))
            threaded.append(timed(lambda entries=entries: list(pool.map(read, entries))))
    say(
        "random batch of 4 + 4, cold, raw safetensors",
        f"{median_ms(ours):.1f} / {median_ms(theirs):.1f} ms",
        "",
    )
    say("  ratio, one thread", f"{median_ms(ours) / median_ms(theirs):.2f} x", "2.2 x at most")
    say("  ratio, four threads", f"{median_ms(threaded) / median_ms(theirs):.2f} x", "")


def clones(store: cache.Store, count: int) -> list[str]:
    """Make tiny entries quickly, without fsync -> their keys."""
    node = encoding.build("text", {"kind": "text", "i": 0}, np.ones((4, 64), np.float32), {}, "zstd")
    metadata, keys = json.loads(node["zarr.json"]), []
    told = metadata["attributes"]["flux2_relay"]
    for number in range(count):
        told["key"]["i"] = number
        keys.append(key_of(told["key"]))
        folder = store.path / "text" / keys[-1]
        folder.mkdir()
        (folder / "c.0.0").write_bytes(node["c.0.0"])
        (folder / "zarr.json").write_text(json.dumps(metadata))
    return keys


def growth(folder: Path, many: int) -> None:
    """Open and read one entry, in a store of 100 entries and in one of many."""
    stores = [(cache.open(folder / f"{count}.zarr", "a"), count) for count in (100, many)]
    keys = [clones(store, count) for store, count in stores]
    dice, times = np.random.default_rng(0), ([], [])
    for _ in range(400):
        for which, (store, count) in enumerate(stores):
            key = keys[which][int(dice.integers(count))]
            times[which].append(timed(lambda path=store.path, key=key: cache.open(path).read("text", key)))
    few, lots = map(median_ms, times)
    say(f"open + read of one entry among 100 and {many:,}", f"{few:.2f} / {lots:.2f} ms", "")
    say("  ratio", f"{lots / few:.2f} x", "1.3 x at most")
    say(f"scan of {many:,} entries", f"{timed(lambda: stores[1][0].keys('text')):.2f} s", "")
    say(
        "  quick check of them, as encode begins with",
        f"{timed(lambda: mend(stores[1][0], {'text': keys[1]})):.1f} s",
        "",
    )


def big_set(store: cache.Store, samples: int) -> None:
    """Open a set of many samples."""
    digits = [key_of({"i": number}) for number in range(samples)]
    body: Mapping[str, object] = {
        "name": "big",
        "shared": {"empty": digits[0], "prefix": None, "pad": None},
        "samples": [sample(n, key, key) for n, key in enumerate(digits)],
    }
    key = store.publish_set(body, {"at": "1"})
    megabytes = (store.path / "sets" / key / "zarr.json").stat().st_size / 1e6
    seconds = statistics.median(timed(lambda: store.open_set(key)) for _ in range(3))
    say(f"set of {samples:,} samples ({megabytes:.0f} MB) opened", f"{seconds:.2f} s", "0.5 s at most")
    store.remove("sets", key)


def loader(store: cache.Store, count: int, steps: int = 60) -> None:
    """Train on nothing, at 50 ms a step, and see how long the steps wait for their batches."""
    keys = [key_of(text_key(n)) for n in range(count)]
    samples = [sample(n, keys[n], key_of(latents_key(n))) for n in range(count)]
    batches = Batches({"shared": {"empty": keys[0]}, "samples": samples}, TrainOptions(batch=4), seed=0)
    width = CAPTION[1]
    contexts = Contexts(store, keys[0], mx.zeros((32, width), mx.bfloat16), mx.zeros((1, width), mx.bfloat16), 512)
    forget(store.path)
    waits = []
    for loaded in load_ahead(batches, store, contexts, 0, steps):
        waits.append(loaded.wait_seconds)
        time.sleep(STEP_SECONDS)
    say("loader, batch 4, 50 ms a step, begun cold: median wait", f"{median_ms(waits):.2f} ms", "1 ms at most")
    say("  longest after the first", f"{1e3 * max(waits[1:]):.1f} ms", "")


def verifying(store: cache.Store) -> None:
    """Full verification: gigabytes of decoded arrays for each second that a core was busy."""
    raw = sum(store.header(kind, key).raw_bytes for kind in ("text", "latents") for key in store.keys(kind))
    busy, wall = time.process_time(), time.perf_counter()
    found = verify(store)
    busy, wall = time.process_time() - busy, time.perf_counter() - wall
    assert found.faults == ()
    say(f"verify of {raw / 1e9:.2f} GB", f"{raw / 1e9 / busy:.2f} GB/s a core", "0.5 GB/s at least")
    say("  on the clock", f"{raw / 1e9 / wall:.2f} GB/s", "")


def loads() -> Iterator[str]:
    """What else the machine was doing."""
    yield " ".join(f"{load:.1f}" for load in os.getloadavg())


if __name__ == "__main__":
    entries = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print(f"{os.cpu_count()} cores, load {next(loads())}")
    with tempfile.TemporaryDirectory(prefix="bench-store-") as scratch:
        place = Path(scratch)
        (place / "plain").mkdir()
        opened = cache.open(place / "store.zarr", "a")
        commits(opened, place / "plain", 60)
        batches_of_four(opened, place / "plain", 60)
        loader(opened, 60)
        verifying(opened)
        big_set(opened, 100_000)
        growth(place, entries)
    print(f"load {next(loads())}")
