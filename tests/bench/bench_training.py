"""Reading beside training: `python tests/bench/bench_training.py [--only streamed|waiting|sweep|plan] [--small]`.

Random weights of width 1024 (2 + 6 blocks, float32, rank 16, 256 image and 128 text tokens) on the CPU, through the
loop that `relay train` runs; each measurement in a process of its own. `streamed`: the base read from disk block by
block at every step, with the page cache emptied of it before each pass where the system allows that (which is not
timed), against the same reads without a step and the same step with all blocks in memory. `waiting`: the share of a
step of batch 4 that it waits for data, from a store of 10,000 entries. `sweep`: four runs together over one base
against the same four one after another, all blocks resident, 8 bit resident and streamed, and whether their losses are
equal. `plan`: the predicted peak of arrays against MLX's, with the process's largest size beside it, on three widths
under three budgets. `--small` only shows that the script works.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

THREADS = os.cpu_count() or 1
ROWS, SIDE, CONTEXT = 128, 16, 1024
CONFIG = {"num_layers": 2, "num_single_layers": 6, "num_attention_heads": 8, "attention_head_dim": 128}
CONFIG |= {"axes_dims_rope": [32, 32, 32, 32], "joint_attention_dim": CONTEXT, "guidance_embeds": False}
SMALL = {"num_attention_heads": 2, "num_layers": 1, "num_single_layers": 2}
ALLOWED = 300e6  # bytes of the process beside blocks, adapters and activations
STEPS, WARM_UP, RUNS = 6, 2, 4
BUDGETS = ("roomy", "weights alone", "streamed")
WIDTHS = {512: 4, 768: 6, 1024: 8}  # and heads


@dataclass(slots=True)
class Lines:
    """A journal in memory."""

    steps: list[Mapping[str, Any]] = field(default_factory=list)

    def write(self, line: Mapping[str, Any]) -> None:
        """Keep one step's metrics."""
        self.steps.append(line)

    def write_validation(self, line: Mapping[str, Any]) -> None:
        """Nothing is held out."""

    def rewind(self, step: int) -> None:
        """Nothing was written before."""

    def say(self, sentence: str) -> None:
        """Nobody listens."""


def make_model(folder: Path, config: Mapping[str, Any]) -> None:
    """A transformer's folder with random weights, a file a block, so that each can be read from disk alone."""
    import mlx.core as mx

    from flux2_relay.stages import spec
    from flux2_relay.stages.train.transformer import tensor_shapes

    place = folder / "transformer"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    files: dict[str, dict[str, mx.array]] = {}
    for name, shape in tensor_shapes(spec.read_transformer_spec(place)).items():
        value = mx.random.normal(shape) * shape[-1] ** -0.5 if len(shape) == 2 else mx.ones(shape)
        files.setdefault(".".join(name.split(".")[:2]) if "blocks" in name else "outer", {})[name] = value
    for file, values in files.items():
        mx.save_safetensors(str(place / f"{file}.safetensors"), values)


def make_store(path: Path, entries: int) -> dict[str, Any]:
    """A store of so many entries, a tenth of them captions -> the body of a set of all; does not wait for the disk."""
    import numpy as np

    from flux2_relay import cache

    store, draw = cache.open(path, "a"), np.random.default_rng(0)
    with mock.patch("os.fsync"):
        captions = max(1, entries // 10)
        texts = [
            store.publish("text", {"n": n, "max_length": ROWS}, draw.standard_normal((ROWS, CONTEXT), np.float32), {})
            for n in range(captions)
        ]
        samples = []
        for n in range(entries - captions):
            key = store.publish("latents", {"n": n}, draw.standard_normal((SIDE, SIDE, 128), np.float32), {})
            latents = {"key": key, "h": SIDE, "w": SIDE, "references": [], "mask": None}
            samples.append(
                {"id": str(n), "text": [texts[n % captions]], "latents": [latents], "repeats": 1, "prior": False}
            )
    return {"shared": {"empty": texts[0], "prefix": None, "pad": None}, "samples": samples, "prompts": []}


def job_of(folder: Path, batch: int, stream: str, steps: int, **changes: Any) -> Any:
    """What `relay train` would be asked to do, with changes to the job."""
    from flux2_relay import cache
    from flux2_relay.cache.sets import SetRecord
    from flux2_relay.stages.train import options
    from flux2_relay.stages.train.job import Job

    body = json.loads((folder / "set.json").read_text())
    job = Job(
        store=cache.open(folder / "store.zarr"),
        record=SetRecord(key="0" * 64, body=body, made={}),
        folder=Path(tempfile.mkdtemp(dir=folder)),
        seed=0,
        lora=options.LoraOptions(rank=16),
        train=options.TrainOptions(steps=steps, batch=batch, dtype="float32"),
        validation=options.ValidationOptions(),
        save=options.SaveOptions(every=10**6),
        previews=options.PreviewOptions(every=0),
        memory=options.MemoryOptions(bits=32, stream=stream, budget=10**12),  # pyright: ignore[reportArgumentType]
        distilled=False,
        metadata={},
        config={},
        resume=False,
        max_steps=None,
        stop=lambda: False,
    )
    return replace(job, **changes)


def load(folder: Path, job: Any, journal: Lines) -> tuple[Any, Any]:
    """The transformer as the plan has it without kept projections, and that plan."""
    from flux2_relay.stages import folders, spec
    from flux2_relay.stages.train import loop

    places = folders.find(str(folder / "model"))
    of = spec.read_transformer_spec(places.transformer)
    plan = loop.layout_of(job, of)
    parts = {name: size for name, size in plan.parts.items() if name != "kept projections"}
    plan = replace(plan, keep=0, parts=parts)
    return loop.load(job, places, of, plan, journal.say), plan


def forget(folder: Path) -> None:
    """Empty the page cache of the weights, where the system offers that."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in (folder / "model/transformer").glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def forget_before_passes(model: Any, folder: Path) -> list[float]:
    """Empty the page cache before each pass -> the seconds that took, a number a pass; no part of a step."""
    announce, seconds = model.residence.announce, []

    def announce_cold(order: list[int]) -> None:
        started = time.perf_counter()
        forget(folder)
        seconds.append(time.perf_counter() - started)
        announce(order)

    model.residence.announce = announce_cold
    return seconds


def train(folder: Path, stream: str, batch: int, steps: int) -> dict[str, float]:
    """Steps of the loop: median seconds, share of waiting, peak resident size and what it may be."""
    from flux2_relay.stages.measure import peak_resident_bytes
    from flux2_relay.stages.train import loop, step_work

    journal = Lines()
    job = job_of(folder, batch, stream, steps)
    model, plan = load(folder, job, journal)
    forgetting = [0.0] * steps if stream != "always" else forget_before_passes(model, folder)
    loop.train(job, model, journal)
    model.residence.close()
    lines, forgetting = journal.steps[WARM_UP:], forgetting[WARM_UP:]
    block = max(step_work.block_bytes(model.spec, place, 32) for place in range(model.spec.blocks))
    beside = sum(plan.parts[name] for name in ("adapter, gradients, moments", "block inputs", "one block's work"))
    busy, waited = (sum(line[name] for line in lines) for name in ("seconds", "wait_seconds"))
    return {
        "seconds": statistics.median(
            line["seconds"] + line["wait_seconds"] - lost for line, lost in zip(lines, forgetting, strict=True)
        ),
        "waiting": waited / (busy + waited),
        "resident_bytes": peak_resident_bytes(),
        "allowed_bytes": 3 * block + beside + ALLOWED,
        "blocks_bytes": sum(step_work.block_bytes(model.spec, place, 32) for place in range(model.spec.blocks)),
    }


def read(folder: Path) -> dict[str, float]:
    """The reads of a step without the step."""
    journal = Lines()
    model, _ = load(folder, job_of(folder, 1, "always", 1), journal)
    order, seconds = [*range(model.spec.blocks), *reversed(range(model.spec.blocks))], []
    for _ in range(STEPS):
        forget(folder)
        started = time.perf_counter()
        model.residence.announce(order)
        for place in order:
            model.residence.weights(place)
        seconds.append(time.perf_counter() - started)
    model.residence.close()
    return {"seconds": statistics.median(seconds[WARM_UP:])}


def sweep(folder: Path, stream: str, bits: int) -> dict[str, Any]:
    """Four runs together, and the same four one after another: seconds of all their steps, losses of all."""
    from flux2_relay.stages.train import loop, many, options

    memory = options.MemoryOptions(bits=bits, stream=stream, budget=10**12)  # pyright: ignore[reportArgumentType]

    def entries() -> list[Any]:
        jobs = [
            job_of(folder, 1, stream, STEPS, seed=seed, memory=memory, lora=options.LoraOptions(rank=4 * (seed + 1)))
            for seed in range(RUNS)
        ]
        return [many.Entry(name=str(job.seed), job=job, journal=Lines()) for job in jobs]

    together, apart = entries(), entries()
    model, _ = load(folder, together[0].job, Lines())
    pace: list[float] = []
    many.train(together, model, pace)
    model.residence.close()
    alone = 0.0
    for one in apart:
        model, _ = load(folder, one.job, Lines())
        loop.train(one.job, model, one.journal)
        model.residence.close()
        alone += statistics.median(line["seconds"] + line["wait_seconds"] for line in one.journal.steps[WARM_UP:])
    losses = [[[line["loss"] for line in one.journal.steps] for one in of] for of in (together, apart)]
    return {"together": statistics.median(pace[WARM_UP:]), "alone": alone, "equal": losses[0] == losses[1]}


def planned(folder: Path, budget: str) -> dict[str, Any]:
    """Two steps under a budget: predicted peak, that of arrays above what was there before, that of the process."""
    import mlx.core as mx

    from flux2_relay.stages import folders, spec
    from flux2_relay.stages.measure import peak_resident_bytes, resident_bytes
    from flux2_relay.stages.train import layout, loop, options

    job, places = job_of(folder, 1, "auto", 2), folders.find(str(folder / "model"))
    of = spec.read_transformer_spec(places.transformer)
    room = {"roomy": 10**12}
    for name, resident in (("weights alone", of.blocks), ("streamed", 0)):
        room[name] = layout.predict(of, loop.load_of(job, of), 32, resident).peak_bytes
    job = replace(job, memory=options.MemoryOptions(bits=32, budget=room[budget]))
    chosen, started = loop.layout_of(job, of), resident_bytes()
    model = loop.load(job, places, of, chosen, lambda _: None)
    mx.reset_peak_memory()
    loop.train(job, model, Lines())
    model.residence.close()
    found = {"predicted": chosen.peak_bytes, "arrays": mx.get_peak_memory()}
    return {**found, "process": peak_resident_bytes(), "started": started, "in_words": chosen.in_words()}


MEASURED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "read": read,
    "resident": lambda folder: train(folder, "never", 1, STEPS),
    "streamed": lambda folder: train(folder, "always", 1, STEPS),
    "waiting": lambda folder: train(folder, "never", 4, 2 * STEPS),
    "sweep": lambda folder: sweep(folder, "never", 32),
    "sweep 8 bit": lambda folder: sweep(folder, "never", 8),
    "sweep streamed": lambda folder: sweep(folder, "always", 32),
    **{f"plan {budget}": partial(planned, budget=budget) for budget in BUDGETS},
}


def in_a_process(what: str, folder: Path) -> dict[str, Any]:
    """One measurement."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(THREADS), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--child", what, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def streamed(folder: Path, runs: int) -> None:
    """Reads, resident and streamed steps in turn; medians."""
    found: dict[str, list[dict[str, float]]] = {"read": [], "resident": [], "streamed": []}
    for _ in range(runs):
        for what, results in found.items():
            results.append(in_a_process(what, folder))
    seconds = {what: statistics.median(one["seconds"] for one in results) for what, results in found.items()}
    one = found["streamed"][-1]
    most = max(run["resident_bytes"] for run in found["streamed"])
    longer = max(seconds["read"], seconds["resident"])
    print(
        f"streamed: step {seconds['streamed']:.3g} s; reading alone {seconds['read']:.3g} s, all blocks resident "
        f"{seconds['resident']:.3g} s: {seconds['streamed'] / longer:.2f} x the longer (at most 1.15); peak resident "
        f"size {most / 1e6:.0f} MB of at most {one['allowed_bytes'] / 1e6:.0f} MB, with "
        f"{max(run['resident_bytes'] for run in found['resident']) / 1e6:.0f} MB resident "
        f"(blocks {one['blocks_bytes'] / 1e6:.0f} MB)",
        flush=True,
    )


def waiting(folder: Path, entries: int) -> None:
    """One run over a large store."""
    found = in_a_process("waiting", folder)
    print(
        f"waiting: {found['waiting']:.2%} of a step of {found['seconds']:.3g} s, batch 4, {entries:,} entries "
        "(at most 1 %)",
        flush=True,
    )


def sweeps(folder: Path, runs: int) -> None:
    """Four runs together against one after another; medians."""
    for what in ("sweep", "sweep 8 bit", "sweep streamed"):
        found = [in_a_process(what, folder) for _ in range(runs)]
        together, alone = (statistics.median(one[name] for one in found) for name in ("together", "alone"))
        equal = "equal" if all(one["equal"] for one in found) else "NOT EQUAL"
        print(
            f"{what}: a step of {RUNS} runs {together:.3g} s together, {alone:.3g} s one after another: "
            f"{alone / together:.2f} x (at least 0.95); losses {equal}",
            flush=True,
        )


def plans(folder: Path, is_small: bool) -> None:
    """Three widths under three budgets, a line each."""
    for width, heads in {256: 2}.items() if is_small else WIDTHS.items():
        place = folder / str(width)
        make_model(place / "model", {**CONFIG, "num_attention_heads": heads})
        (place / "set.json").write_text(json.dumps(make_store(place / "store.zarr", 10)))
        for budget in BUDGETS:
            one = in_a_process(f"plan {budget}", place)
            predicted, arrays, process, started = (
                one[name] / 1e6 for name in ("predicted", "arrays", "process", "started")
            )
            print(
                f"plan: {width} wide, budget {budget}: predicted {predicted:.0f} MB, arrays {arrays:.0f} MB "
                f"({arrays / predicted:.3f} x), process {process:.0f} MB, of which {started:.0f} MB before the model",
                flush=True,
            )


def main() -> None:
    """Make model and stores, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=["streamed", "waiting", "sweep", "plan"])
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    import flux2_relay.stages  # noqa: F401 - loads a BLAS before MLX

    if arguments.child:
        what, folder = arguments.child
        print(json.dumps(MEASURED[what](Path(folder))))
        return
    print(f"{THREADS} threads, load {os.getloadavg()[0]:.1f}, {arguments.runs} runs each in turn, medians")
    entries = {"streamed": 40, "waiting": 200 if arguments.small else 10_000, "sweep": 40, "plan": 10}
    cases = {
        "streamed": streamed,
        "waiting": lambda folder, _: waiting(folder, entries["waiting"]),
        "sweep": sweeps,
        "plan": lambda folder, _: plans(folder, arguments.small),
    }
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch) / "model", {**CONFIG, **(SMALL if arguments.small else {})})
        for what in [arguments.only] if arguments.only else entries:
            folder = Path(scratch) / what
            folder.mkdir()
            (folder / "model").symlink_to(Path(scratch) / "model")
            (folder / "set.json").write_text(json.dumps(make_store(folder / "store.zarr", entries[what])))
            cases[what](folder, arguments.runs)


if __name__ == "__main__":
    main()
