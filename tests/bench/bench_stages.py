"""Both stages against diffusers, transformers and peft on one checkpoint: `python tests/bench/bench_stages.py`.

Float32 on the CPU, the same threads on both sides. Each side runs in a process of its own, in turn, so that its peak
resident size is its own; the median of the runs is printed. Needs the extra `oracle`; prints what it skips without.
Ours alone: `relay encode` on a store that is complete.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parent.parent
THREADS = os.cpu_count() or 1
SENTENCE = "a red fox runs over the lazy dog in snow, morning light, oil painting of two boats and seven birds"

HONEST = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3072, "num_key_value_heads": 2}
HONEST |= {"num_attention_heads": 8, "head_dim": 128}
TOKENS = 544  # that the tokenizer knows; the head that theirs computes is as wide as the embedding
TRANSFORMER = {"num_layers": 2, "num_single_layers": 6, "num_attention_heads": 8, "attention_head_dim": 128}
CASES = {
    # name: (what, family, layers of the text encoder, captions or steps)
    "captions, dev-like, 40 layers": ("encode", "dev", 40, 8),
    "captions, klein-like, 36 layers": ("encode", "klein", 36, 4),
    "steps, 2 + 6 blocks of width 1024, 384 rows, rank 16, peft checkpointed": ("step", "dev", 31, 2),
}
ENOUGH_SECONDS = 15.0  # of one side's runs, of which the median counts
SECOND = "second encode of 10,000 entries"


def captions(count: int) -> list[str]:
    """Captions of some 20 to 80 tokens."""
    words = SENTENCE.split()
    return [" ".join(words[(n + i) % len(words)] for i in range(11 + (7 * n) % 24)) for n in range(count)]


def make(folder: Path, family: str, layers: int) -> None:
    """A random checkpoint with an encoder of honest width and a transformer of 2 + 6 blocks of width 1024."""
    from oracle import checkpoints

    sizes = checkpoints.Sizes(
        text={**HONEST, "num_hidden_layers": layers},
        transformer={**TRANSFORMER, "axes_dims_rope": (32, 32, 32, 32), "guidance_embeds": family == "dev"},
        vae=checkpoints.VAE,
        tokens=TOKENS,
    )
    {"dev": checkpoints.dev_like, "klein": checkpoints.klein_like}[family](folder, 0, sizes)


def encode_ours(folder: Path, count: int) -> Callable[[], object]:
    """One pass of our text encoder over the captions, as stage one runs it: rows, not whole contexts."""
    import mlx.core as mx

    from flux2_relay.stages import spec
    from flux2_relay.stages.encode.text import load_text_encoder

    encoder = load_text_encoder(folder, spec.from_checkpoint(folder).text, bits=32)

    def run() -> None:
        for done in encoder.passes(captions(count)):
            mx.eval([rows for _, rows in done.rows])

    return run


def encode_theirs(folder: Path, count: int) -> Callable[[], object]:
    """Diffusers' `encode_prompt`, four captions at a time."""
    import torch
    from oracle.reference import Reference

    torch.set_num_threads(THREADS)
    reference = Reference(folder)
    _ = reference.text_encoder
    texts = captions(count)
    return lambda: [reference.context(texts[i : i + 4]) for i in range(0, count, 4)]


def step_case() -> Any:
    """One item of 256 image tokens and 128 text tokens."""
    from tiny import cases

    return cases.draw(3 * HONEST["hidden_size"], seed=0, text=128, grids=((16, 16),), sigma=(0.5,), guidance=(1.0,))


def step_ours(folder: Path, count: int) -> Callable[[], object]:
    """Training steps of ours: gradients, clip, AdamW."""
    from tiny import ours

    from flux2_relay.stages.train.lora import LoraOptions
    from flux2_relay.stages.train.options import TrainOptions

    model = ours.load(folder)
    ours.attach(model, LoraOptions(rank=16))
    return lambda: ours.train(model, [step_case()] * count, TrainOptions())


def step_theirs(folder: Path, count: int) -> Callable[[], object]:
    """Training steps of diffusers with peft and gradient checkpointing, AdamW, clip."""
    import torch
    from oracle import reference_training
    from oracle.reference import Reference
    from peft import LoraConfig

    torch.set_num_threads(THREADS)
    model = Reference(folder).transformer
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=reference_training.block_linears(model)))
    model.enable_gradient_checkpointing()
    model.train()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update, case = torch.optim.AdamW(factors, lr=1e-4), step_case()

    def run() -> None:
        for _ in range(count):
            update.zero_grad()
            reference_training.loss(model, case).backward()
            torch.nn.utils.clip_grad_norm_(factors, 1.0)
            update.step()

    return run


SIDES = {
    "encode": {"ours": encode_ours, "theirs": encode_theirs},
    "step": {"ours": step_ours, "theirs": step_theirs},
}


def measure(what: str, side: str, folder: Path, count: int) -> None:
    """Child process: load, warm up once, time runs for some seconds; prints a JSON object."""
    sys.path.insert(0, str(TESTS))
    import flux2_relay.stages  # noqa: F401 - loads a BLAS before MLX
    from flux2_relay.stages.measure import peak_resident_bytes

    run = SIDES[what][side](folder, count)
    run()
    seconds: list[float] = []
    while sum(seconds) < ENOUGH_SECONDS:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"per_second": count / statistics.median(seconds), "peak_bytes": peak_resident_bytes()}))


def compare(what: str, folder: Path, count: int, runs: int) -> str:
    """Both sides in turn -> a line with medians and ratios."""
    found: dict[str, list[dict]] = {"ours": [], "theirs": []}
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(THREADS), "OMP_NUM_THREADS": str(THREADS)}
    for _ in range(runs):
        for side, results in found.items():
            command = [sys.executable, "-W", "ignore", __file__, "--child", what, side, str(folder), str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = ({key: statistics.median(r[key] for r in rs) for key in rs[0]} for rs in found.values())
    return (
        f"ours {ours['per_second']:.3g}/s {ours['peak_bytes'] / 1e6:.0f} MB, "
        f"theirs {theirs['per_second']:.3g}/s {theirs['peak_bytes'] / 1e6:.0f} MB: "
        f"{ours['per_second'] / theirs['per_second']:.2f} x the speed, "
        f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f} x the memory"
    )


def second_encode(scratch: Path, pictures: int, runs: int) -> str:
    """`relay encode` where nothing is missing, from the start of the process to its end -> a line."""
    from tiny import model
    from tiny.project import Project

    data = scratch / "pictures"
    write_pictures(data, pictures)
    project = Project(scratch / "project", model.write_dev(scratch / "tiny"), data)
    project.write({"data": {"resolutions": [32]}})
    entries = fill(project.config)
    command = [sys.executable, "-m", "flux2_relay.pipeline.cli", "encode", "-c", str(project.config)]
    seconds = []
    for _ in range(1 + runs):  # the first finds out what the pictures are and remembers it
        started = time.perf_counter()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - started)
    assert "encoded 0 captions and 0 images" in said, said
    return f"{entries} entries, {statistics.median(seconds[1:]):.2f} s (the first time {seconds[0]:.2f} s)"


def write_pictures(folder: Path, count: int) -> None:
    """Plain pictures, each of a colour of its own, with tiny captions."""
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (32, 32), (number % 256, number // 256, 7)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red fox number {number}")


def fill(config_file: Path) -> int:
    """Put everything that a config needs into its store, without a model and without waiting for the disk -> entries.

    The arrays are not what a model would give; nothing in here reads them.
    """
    import numpy as np

    from flux2_relay import cache
    from flux2_relay.pipeline import commands
    from flux2_relay.pipeline.config import load_config
    from flux2_relay.stages.encode import stage

    config = load_config(config_file, ())
    with mock.patch("os.fsync"):
        job = commands.encode_job(config, lambda: cache.open(config.cache.path, "a"))
        want = stage.needed(job)
        for key in want.text.values():
            job.store.publish("text", key, np.ones((2, 192), np.float32), {})
        for of in want.latents.values():
            job.store.publish("latents", of.key, np.ones((2, 2, 128), np.float32), {})
    return len(want.text) + len(want.latents)


def main() -> None:
    """Make the checkpoints, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--pictures", type=int, default=5000, help=f"of the {SECOND}, each with its caption")
    arguments = parser.parse_args()
    if arguments.child:
        what, side, folder, count = arguments.child
        measure(what, side, Path(folder), int(count))
        return
    sys.path.insert(0, str(TESTS))
    print(f"{THREADS} threads, load {os.getloadavg()[0]:.1f}, {arguments.runs} runs each in turn, medians")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # what is remembered of files is that of this run
        if arguments.only in SECOND:
            print(f"{SECOND}: {second_encode(Path(scratch), arguments.pictures, arguments.runs)}", flush=True)
        if importlib.util.find_spec("diffusers") is None:
            print("the others are skipped: they need the extra `oracle` (make oracle installs it)")
            return
        for name, (what, family, layers, count) in CASES.items():
            if arguments.only not in name:
                continue
            folder = Path(scratch) / f"{family}-{layers}"
            if not folder.exists():
                make(folder, family, layers)
            print(f"{name}: {compare(what, folder, count, arguments.runs)}", flush=True)


if __name__ == "__main__":
    main()
