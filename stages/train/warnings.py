"""What is worth a sentence before, and shortly after, a training begins: it runs, but a night may be lost on it."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from flux2_relay.stages.measure import in_words
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.batches import Item, items
from flux2_relay.stages.train.job import Job
from flux2_relay.stages.train.lora import starts_at_zero
from flux2_relay.stages.train.optimizer import moments
from flux2_relay.stages.train.options import LoraOptions, SaveOptions, TrainOptions

LOOK_AT = 20
"""The step after which no B should be zero any more."""
_LONG = 50  # steps from which on it matters what powers the machine
_RATES = {"adamw": (1e-6, 2e-3), "adafactor": (1e-6, 1e-3), "lion": (1e-7, 3e-4)}
"""Learning rates that people train LoRAs with; `prodigy` has advice of its own (`optimizer.advice`)."""
_RANKS = 256
_SCALES = 1 / 16, 8.0
_KEPT_FREE = 1 << 30  # bytes of a disk that nobody should count on
_PATIENCE = 10  # seconds for the system's answer


def before(job: Job, spec: TransformerSpec, adapter: int) -> list[str]:
    """All of it for one training; `adapter` is the number of its adapters' weights."""
    found = [*of_model(spec, job.distilled), *of_options(job.train, job.lora)]
    found += of_data(list(items(job.record.body)), job.train)
    found += of_disk(job.folder, run_bytes(adapter, job.train, job.save, job.train.steps))
    return found + (power() if job.train.steps >= _LONG else [])


def of_model(spec: TransformerSpec, distilled: bool) -> list[str]:
    """A model without a guidance input that needs none has been distilled to few steps."""
    if not distilled or spec.guidance:
        return []
    return [
        "this Klein is distilled to a few steps, and LoRAs trained on it tend to collapse or come out grey: train on "
        "the base model of its size, the LoRA then works on both"
    ]


def of_options(train: TrainOptions, lora: LoraOptions) -> Iterator[str]:
    """What lies far outside the customary."""
    least, most = _RATES.get(train.optimizer, (0.0, float("inf")))
    if train.lr == 0:
        yield "train.lr is 0: nothing is learned"
    elif not least <= train.lr <= most:
        yield f"train.lr is {train.lr:g}; with {train.optimizer} people train LoRAs at {least:g} to {most:g}"
    widest = max([lora.rank, *lora.ranks.values()])
    if widest > _RANKS:
        yield f"lora.rank is {widest}; ranks above {_RANKS} cost memory and learn little more"
    scale = lora.alpha / lora.rank
    if not _SCALES[0] <= scale <= _SCALES[1]:
        effect = "a weak LoRA unless train.lr is raised" if scale < 1 else "a learning rate that is as much too high"
        yield f"lora.alpha / lora.rank is {scale:g}, which multiplies every update: {effect}"


def of_data(pictures: Sequence[Item], train: TrainOptions) -> list[str]:
    """Whether a batch shows one picture twice."""
    counts = Counter(item.bucket for item in pictures)
    short = [count for count in counts.values() if count < train.batch]
    if short:
        return [
            f"train.batch is {train.batch}, but {len(short)} of {len(counts)} buckets hold fewer pictures (the "
            f"smallest {min(short)}): batches of them show a picture more than once. A smaller train.batch with more "
            "train.accumulate does not"
        ]
    if len(pictures) < train.batch * train.accumulate:
        return [
            f"an update takes {train.batch * train.accumulate} pictures (train.batch x train.accumulate), but there "
            f"are {len(pictures)}: it shows some more than once"
        ]
    return []


def run_bytes(adapter: int, train: TrainOptions, save: SaveOptions, left: int) -> int:
    """What a run writes in `left` steps at most: the checkpoints that stay and the adapters, float32."""
    of_checkpoint = 4 * adapter * (1 + moments(train) + (train.ema is not None))
    checkpoints = min(save.keep + 1, -(-left // save.every) + 1)
    return checkpoints * of_checkpoint + 4 * adapter * (1 + (train.ema is not None)) if left else 0


def of_disk(folder: Path, needed: int) -> list[str]:
    """Whether the disk will be full before the end; what lies there of this run already is counted as free."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    own = sum(file.stat().st_size for file in folder.glob("checkpoints/*/*.safetensors"))
    free = shutil.disk_usage(place).free - _KEPT_FREE + own
    if needed <= free:
        return []
    return [
        f"the checkpoints of this run will take {in_words(needed)}, and {in_words(max(0, free))} are free in {place} "
        "beyond a reserve of 1 GiB: the disk will be full before the end. Make room, or lower save.keep or lora.rank"
    ]


def power() -> list[str]:
    """On a Mac: a display that is on holds the GPU to short work, and a battery does not last a night."""
    found = []
    if "'Battery Power'" in _pmset("-g", "batt").partition("\n")[0]:
        found.append("this Mac runs on its battery: it is slower and will stop; plug it in")
    events = [line for line in _pmset("-g", "log").splitlines() if "Display is turned" in line]
    if events and "turned on" in events[-1]:
        found.append(
            "the display is on: macOS stops GPU work that holds it up, and drawing takes its share; let it sleep "
            "(`pmset displaysleepnow` under `caffeinate -s`)"
        )
    return found


def _pmset(*arguments: str) -> str:
    """What macOS says of its power; nothing anywhere else, or where it does not answer in time."""
    if shutil.which("pmset") is None:
        return ""
    try:
        done = subprocess.run(
            ["pmset", *arguments], capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def of_adapter(values: Mapping[str, mx.array]) -> str | None:
    """What to say of an adapter after `LOOK_AT` steps: a factor begins as zero, and the first update moves it."""
    matrices = {name: value for name, value in values.items() if starts_at_zero(name)}
    zero = [name for name, value in matrices.items() if not bool(mx.any(value).item())]
    if not zero:
        return None
    which = "every module" if len(zero) == len(matrices) else f"{len(zero)} of {len(matrices)} modules"
    return (
        f"after {LOOK_AT} steps a factor is still zero in {which}, e.g. {zero[0]}: nothing has been learned there. "
        "Look at train.lr, train.warmup and whether the loss is finite"
    )
