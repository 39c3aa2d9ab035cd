"""`relay bench`: one line on how fast this machine trains a model of a given size, to be shared."""

import os
import platform
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flux2_relay.pipeline import signals
from flux2_relay.pipeline.cache_commands import print_json
from flux2_relay.pipeline.config import Config
from flux2_relay.stages import blas, figures, folders, memory, spec
from flux2_relay.stages.catalogue import CATALOGUE
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.train import course, pace
from flux2_relay.stages.train.course import Task
from flux2_relay.stages.train.layout import Layout, LayoutOptions
from flux2_relay.stages.train.options import LoraOptions, MemoryOptions, TrainOptions
from flux2_relay.stages.train.pace import Pace
from flux2_relay.stages.train.residence import Resident, Streamed
from flux2_relay.stages.train.transformer import Transformer, load_transformer

if TYPE_CHECKING:
    from flux2_relay.stages.folders import ModelFolders
    from flux2_relay.stages.spec import TransformerSpec

_TEXT_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the command line says."""

    model: str
    resolution: int | None
    bits: str
    steps: int | None
    as_json: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """Which model is timed with which options."""

    name: str
    task: Task
    places: "ModelFolders | None"
    """None for random weights."""
    resolution: int


def run(asked: Asked, config: Config | None) -> None:
    """Time it, and print the line; what happens on the way goes to stderr.

    Ctrl-C ends it with the line of what was timed so far, if a step was over, and status 130; SIGTERM too, with 143.
    """
    subject = _of_catalogue(asked) if config is None else _of_config(asked, config)
    make = None if subject.places is None else partial(_load, subject.places, subject.task)
    click.echo(blas.describe(), err=True)
    with signals.end_it() as status:
        try:
            found = pace.find(subject.task, make, lambda sentence: click.echo(sentence, err=True))
        except KeyboardInterrupt:
            click.echo("relay: stopped before the first step was over; nothing was timed", err=True)
            sys.exit(status())
    told = _told(subject, found)
    if asked.as_json:
        print_json(told)
    else:
        click.echo(_line(told))
    if found.stopped:
        click.echo("relay: stopped before the last step; the line says what was timed until then", err=True)
        sys.exit(status())


def _of_catalogue(asked: Asked) -> _Subject:
    """Random weights at a known model's size."""
    is_gpu = memory.is_gpu()
    train = TrainOptions(dtype="bfloat16" if is_gpu else "float32")
    wanted = MemoryOptions(bits="auto" if is_gpu else 32)
    return _subject(asked.model, CATALOGUE[asked.model][0], asked, (train, wanted, LoraOptions()), 512)


def _of_config(asked: Asked, config: Config) -> _Subject:
    """The weights, adapters and memory of a config."""
    model = config.model
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    folders.require(places, ("transformer",), spec.name_of(places))
    transformer = spec.read_transformer_spec(places.transformer)
    name = spec.name_of(places) or Path(model.path).name
    resolution = max((max(options.resolutions) for options in config.data), default=512)
    options = config.train, config.memory, config.lora
    subject = _subject(name, transformer, asked, options, resolution)
    if folders.is_there("text_encoder", places.text_encoder):
        rows = spec.read_text_spec(places.text_encoder).length
        subject = replace(subject, task=replace(subject.task, text_rows=rows))
    return replace(subject, places=places)


def _subject(
    name: str,
    transformer: "TransformerSpec",
    asked: Asked,
    options: tuple[TrainOptions, MemoryOptions, LoraOptions],
    usual: int,
) -> _Subject:
    train, wanted, adapters = options
    if asked.bits != "auto":
        wanted = replace(wanted, bits=int(asked.bits))  # pyright: ignore[reportArgumentType] - the command's choices
    resolution = (asked.resolution or usual) // 16 * 16
    side = resolution // 16
    task = Task(
        spec=transformer,
        options=LayoutOptions(train=train, memory=wanted, dropout=adapters.dropout, kind=adapters.kind),
        lora=adapters,
        size=(side, side),
        text_rows=_TEXT_ROWS,
        steps=asked.steps,
    )
    return _Subject(name=name, task=task, places=None, resolution=resolution)


def _load(places: "ModelFolders", task: Task, _: "TransformerSpec", layout: Layout) -> Transformer:
    """Real weights, as training loads them."""
    residence = partial(Streamed, resident=layout.resident, ahead=layout.ahead) if layout.streamed else Resident
    copy = task.options.memory.copy
    return load_transformer(
        places.root, task.spec, layout.bits, task.dtype, residence, Path(copy).expanduser() if copy else None
    )


def _told(subject: _Subject, found: Pace) -> dict[str, object]:
    train, layout = subject.task.options.train, found.layout
    return {
        "machine": figures.device(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{'macOS ' + platform.mac_ver()[0] if platform.mac_ver()[0] else platform.system()}",
        "model": subject.name,
        "weights": "random" if subject.places is None or found.computed else "real",
        "resolution": subject.resolution,
        "batch": train.batch * train.accumulate,
        "rank": subject.task.lora.rank,
        "bits": layout.bits,
        "dtype": train.dtype,
        "blocks": layout.blocks,
        "resident": layout.resident,
        "seconds_a_step": found.seconds,
        "slowest_seconds": found.slowest,
        "steps": found.timed,
        "how": "computed" if found.computed else "measured",
        "stopped": found.stopped,
        "from": _source(subject, found),
        "products": blas.describe(),
        "peak_bytes": found.peak_bytes,
        "predicted_peak_bytes": layout.peak_bytes,
        "versions": {"flux2-relay": version("flux2-relay"), "mlx": version("mlx"), "python": platform.python_version()},
    }


def _source(subject: _Subject, found: Pace) -> str:
    """What the seconds of a step come from."""
    said = [f"median of {found.timed}" if found.timed else "the warm-up alone"]
    if found.computed:
        how = f"scaled by operations from {course.in_blocks(found.parts[-1], subject.task)}"
        said.insert(0, how if found.scaled else f"computed from a few of the {found.layout.blocks} blocks")
        said += ["reading from disk not in it"] if found.layout.streamed else []
    return ", ".join([*said, *(["stopped early"] if found.stopped else [])])


def _line(told: dict[str, object]) -> str:
    """Everything that somebody who compares needs."""
    computed = told["how"] == "computed"
    where = "all in memory" if told["resident"] == told["blocks"] else f"{told['resident']}/{told['blocks']} in memory"
    peak = f"peak {in_words(float(str(told['peak_bytes'])))}" if not computed else "peak not measured"
    versions = told["versions"]
    assert isinstance(versions, dict)
    return (
        f"relay bench: {told['machine']}, {in_words(float(str(told['memory_bytes'])))}, {told['system']} | "
        f"{told['model']}, {told['weights']} weights, {told['bits']} bit, {where} | "
        f"{told['resolution']} x {told['resolution']}, batch {told['batch']}, rank {told['rank']}, {told['dtype']} | "
        f"{float(str(told['seconds_a_step'])):.3g} s a step ({told['from']}) | "
        f"{peak} (predicted {in_words(float(str(told['predicted_peak_bytes'])))}) | "
        f"flux2-relay {versions['flux2-relay']}, mlx {versions['mlx']}"
    )
