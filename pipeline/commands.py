"""What each command does: the config taken apart and handed to one stage, the result said in a sentence.

A stage is imported when its command runs and never beside another: each is its own process.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import card, closing, events, live, origin, rank, run_folder
from flux2_relay.pipeline.config import Config, flat
from flux2_relay.pipeline.run_folder import RunFolder, say

if TYPE_CHECKING:
    from flux2_relay.cache import Store
    from flux2_relay.cache.sets import SetRecord
    from flux2_relay.stages.catalogue import PartName
    from flux2_relay.stages.encode import stage
    from flux2_relay.stages.folders import ModelFolders
    from flux2_relay.stages.spec import TransformerSpec
    from flux2_relay.stages.train.job import Job as TrainJob
    from flux2_relay.stages.train.ranks import Group


def encode(config: Config, shard: str = "1/1") -> None:
    """Stage one, or of its work the share I/N that is named."""
    from flux2_relay import cache
    from flux2_relay.stages.encode import sharing, stage

    share = sharing.shard(shard)
    under_way = closing.Stage(run_folder.RunFolder(config.run.folder))
    say_blas()
    job = encode_job(config, lambda: cache.open(config.cache.path, "a", codec=config.cache.codec))
    done = stage.encode(replace(job, shard=share))
    state = f"lacks {done.others} entries of other shards" if done.others else "is complete"
    say(f"{config.cache.path}: {done.present} entries were there; set {done.set[:12]} {state}")
    made = f"encoded {done.captions} captions and {done.images} images"
    under_way.close(made, closing.same_config("train"))


def encode_job(config: Config, open_store: "Callable[[], Store]") -> "stage.Job":
    """What stage one is asked to do; the store is opened last, when faults of the data and the model have shown."""
    from flux2_relay.pipeline.request import data_paths, set_request
    from flux2_relay.stages import folders, memory
    from flux2_relay.stages.encode import stage
    from flux2_relay.stages.encode.dataset import read_samples
    from flux2_relay.stages.encode.entries import Prompt

    options, model = config.previews, config.model
    prompts = [
        Prompt(
            text=p.prompt,
            negative=p.negative or "",
            size=p.size or options.size,
            seed=p.seed or 0,
            references=tuple(Path(name).expanduser() for name in p.references),
        )
        for p in options.pictures()
    ]
    samples = read_samples(config.data)
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    require(config, places, "text_encoder", "tokenizer", "vae")
    check_model(config, places)
    return stage.Job(
        name=config.run.name,
        request=set_request(config),
        samples=samples,
        prompts=prompts,
        folders=places,
        encode=config.encode,
        text_dtype=config.cache.dtype,
        latents_dtype=config.cache.latents_dtype,
        seed=config.run.seed,
        budget_bytes=memory.budget_bytes(config.memory.budget),
        say=say,
        told={"paths": data_paths(config)},
        store=open_store(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """What stage two works with: a complete set of a store, and a transformer that fits it."""

    store: "Store"
    record: "SetRecord"
    places: "ModelFolders"
    spec: "TransformerSpec"
    distilled: bool


def ready(config: Config) -> Ready:
    """Find set and transformer; InputError says what is missing or does not fit."""
    from flux2_relay import cache
    from flux2_relay.pipeline.request import find_set
    from flux2_relay.stages import folders

    store = cache.open(config.cache.path, "r")
    record = find_set(store, config)
    missing = store.missing(record)
    if missing:
        counts = ", ".join(f"{len(keys)} of {kind} ({keys[0][:12]} ...)" for kind, keys in missing.items())
        raise InputError(
            f"{config.cache.path}: {counts} that this config needs are missing; run `relay encode`, it makes only those"
        )
    model = config.model
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    require(config, places, "transformer")
    spec, distilled = check_model(config, places)
    _check_encoder(places, record.body["identities"]["encoder"])
    return Ready(store=store, record=record, places=places, spec=spec, distilled=distilled)


def train_job(config: Config, given: Ready, folder: Path) -> "TrainJob":
    """What stage two is asked to do: a fresh run in `folder` without an end before its last step."""
    from flux2_relay.stages.train.job import Job

    return Job(
        store=given.store,
        record=given.record,
        folder=folder,
        seed=config.run.seed,
        lora=config.lora,
        train=config.train,
        validation=config.validation,
        save=config.save,
        previews=config.previews,
        memory=config.memory,
        distilled=given.distilled,
        metadata=card.of_run(config, given.record.key),
        config=flat(config),
        resume=False,
        max_steps=None,
        stop=lambda: False,
    )


def train(
    config: Config, max_steps: int | None, resume: bool, stop: Callable[[], bool], group: "Group | None" = None
) -> None:
    """Stage two, as one of `group`; a process alone has none."""
    from flux2_relay.pipeline import run_lock
    from flux2_relay.stages.train.ranks import ALONE

    given = ready(config)
    job = replace(
        train_job(config, given, config.run.folder), resume=resume, max_steps=max_steps, stop=stop, group=group or ALONE
    )
    if not job.group.is_first:
        _assist(job, given)
        return
    if not resume:
        run_folder.refuse_existing(config.run.folder)
    with run_lock.hold(config.run.folder):
        _train(config, given, job)


def _assist(job: "TrainJob", given: Ready) -> None:
    """Train as a rank that is not the first: it writes nothing, says nothing, and draws no previews."""
    from flux2_relay.stages.train import loop

    if job.group.any(False):  # the first finds the run finished
        return
    loop.run(replace(job, previews=replace(job.previews, every=0)), given.places, given.spec, rank.Silent())


def set_up(config: Config, given: Ready, job: "TrainJob", label: str = "") -> RunFolder:
    """The run's folder, if it can be gone on with under this config, and what has changed said."""
    from flux2_relay.stages.train import resume as resuming

    data = resuming.digest_of_data(given.record.body)
    changes = resuming.check(config.run.folder, flat(config), data, job.group.size) if job.resume else []
    run = run_folder.create(config, label)
    for sentence in changes:
        run.say(sentence)
    return run


def _train(config: Config, given: Ready, job: "TrainJob") -> None:
    from flux2_relay.stages.train import loop
    from flux2_relay.stages.train.transformer import stock_of

    run = set_up(config, given, job)
    if job.group.any(is_finished(run, config.train.steps)):
        say(f"{run.path} is finished: {config.train.steps} steps are done; the adapter is {run.adapter}")
        say(f"next: {_after_training(run, is_finished=True)}")
        return
    say_blas()
    layout = loop.layout_of(job, given.spec, stock_of(given.places.transformer, given.spec))
    origin.keep(run, config, job, given.places, given.spec, layout)
    under_way = closing.Stage(run, layout.peak_bytes)
    with events.journal(run, config.log.tensorboard) as journal, live.watched(journal, run, config) as watched:
        done = loop.run(job, given.places, given.spec, watched)
    say(f"the adapter is {run.adapter}; the report is {run.path / 'report.html'}")
    steps = config.train.steps
    under_way.close(f"{done} of {steps} steps done", _after_training(run, is_finished=done >= steps))


def _after_training(run: RunFolder, is_finished: bool) -> str:
    """The command that comes next: the same again, or what makes pictures of previews, or the page."""
    if not is_finished:
        return closing.same_config("train")
    return after_training([run.path])


def after_training(folders: Sequence[Path]) -> str:
    """The command that comes when runs are finished: what makes pictures of previews, or the pages."""
    has_previews = any(any((folder / "previews").glob("*.safetensors")) for folder in folders)
    return shlex.join(["relay", "decode" if has_previews else "report", *map(str, folders)])


def decode(paths: tuple[Path, ...]) -> None:
    """Preview latents of runs to PNG, one run after the other."""
    runs = [run_folder.open_run(path) for path in dict.fromkeys(paths)]
    say_blas()
    for run, config in runs:
        _decode(run, config, shlex.join(["relay", "report", *(str(path) for path in dict.fromkeys(paths))]))


def _decode(run: RunFolder, config: Config, then: str) -> None:
    from flux2_relay.stages import folders, memory
    from flux2_relay.stages.decode import stage

    under_way = closing.Stage(run)
    model = config.model
    budget_bytes = memory.budget_bytes(config.memory.budget)
    made = stage.decode(run.path, folders.find(model.path, vae=model.vae), say, budget_bytes)
    say(f"the contact sheet is {run.path / 'previews' / 'sheet.png'}")
    under_way.close(f"decoded {len(made)} previews", then)


def report(paths: tuple[Path, ...], output: Path | None) -> None:
    """One HTML page a run, and of several one more that compares them."""
    from flux2_relay.pipeline import comparison
    from flux2_relay.pipeline.report import write_report

    runs = [run_folder.open_run(path) for path in dict.fromkeys(paths)]
    if output is not None and len(runs) == 1:
        raise InputError("-o names the page that compares runs; one run's report is always report.html in its folder")
    for run, config in runs:
        origin.take_thumbnails(run, config)
        say(f"the report is {write_report(run, config)}")
    if len(runs) > 1:
        say(f"the comparison is {comparison.write(runs, output)}")


def require(config: Config, places: "ModelFolders", *parts: "PartName") -> None:
    """Refuse a model without the files of these parts, naming what to download."""
    from flux2_relay.stages import folders, spec

    folders.require(places, parts, spec.name_of(places) if config.model.name == "auto" else config.model.name)


def check_model(config: Config, places: "ModelFolders") -> "tuple[TransformerSpec, bool]":
    """The transformer's spec and whether it is distilled, if it is what `model.name` says and fits its encoder.

    A training machine need not have the encoder.
    """
    from flux2_relay.stages import folders, spec

    transformer = spec.read_transformer_spec(places.transformer)
    distilled = spec.is_distilled(places.root, config.model.name)
    spec.check_name(config.model.name, transformer, distilled, places.root)
    if folders.is_there("text_encoder", places.text_encoder):
        text = spec.read_text_spec(places.text_encoder)
        if text.context_width != transformer.context_width:
            raise InputError(
                f"{places.text_encoder} gives {text.context_width} channels, but {places.transformer} takes "
                f"{transformer.context_width}: these are parts of two models; correct model.path or model.text_encoder"
            )
    return transformer, distilled


def _check_encoder(places: "ModelFolders", encoded_with: str) -> None:
    """Refuse to train on captions of another encoder than the one that stands beside the transformer.

    A training machine need not have an encoder; where it has one that was never hashed, it is not hashed for this.
    """
    from flux2_relay.stages import folders, identity, spec
    from flux2_relay.stages.encode import encoder_weights

    if not folders.is_there("text_encoder", places.text_encoder):
        return
    text = spec.read_text_spec(places.text_encoder)
    tensors = encoder_weights.open_encoder(places.text_encoder, text)
    if identity.is_cheap(tensors) and encoder_weights.encoder_identity(tensors, text) != encoded_with:
        raise InputError(
            f"{places.text_encoder} is another text encoder than the one this store's captions were encoded with; "
            "run `relay encode` to encode them with it, or put the encoder of then back"
        )


def is_finished(run: RunFolder, steps: int) -> bool:
    """Whether a run has been trained to its last step."""
    from flux2_relay.stages.train import checkpoint

    saved = checkpoint.saved(run.path / "checkpoints")
    return run.adapter.exists() and bool(saved) and int(saved[-1].name) >= steps


def say_blas() -> None:
    """Tell which library multiplies."""
    from flux2_relay.stages import blas

    say(blas.describe())
