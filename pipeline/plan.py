"""`relay plan`: what `encode` and `train` would do and take, before a weight is read. Makes nothing.

Weights that are large and were never hashed on this machine have an "unknown identity" unless `--hash` is given.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from flux2_relay import cache
from flux2_relay.cache import Store
from flux2_relay.cache.errors import InputError
from flux2_relay.cache.nodes import Folder
from flux2_relay.cache.sets import SetRecord
from flux2_relay.pipeline import commands, lacking
from flux2_relay.pipeline.cache_commands import print_json
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.lacking import Entries
from flux2_relay.pipeline.plan_text import Data, Disk, Encoding, Plan, Together, Training, write
from flux2_relay.pipeline.request import find_set, set_request
from flux2_relay.stages import figures, folders, identity, memory, spec
from flux2_relay.stages.encode import forecast
from flux2_relay.stages.encode.forecast import Forecast
from flux2_relay.stages.encode.stage import Job
from flux2_relay.stages.train import checkpoint, lora, warnings
from flux2_relay.stages.train.batches import Item, items
from flux2_relay.stages.train.layout import LayoutOptions, choose, load_for, pace_of
from flux2_relay.stages.train.optimizer import advice
from flux2_relay.stages.train.step_work import Load
from flux2_relay.stages.train.transformer import stock_of
from flux2_relay.stages.weights import Tensors

if TYPE_CHECKING:
    from flux2_relay.stages.folders import ModelFolders

_KEPT_FREE = 1 << 30  # bytes of a disk that nobody should count on


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was found of data, model and store."""

    places: "ModelFolders"
    store: Store
    exists: bool
    record: SetRecord | None
    known: Forecast | None
    encoding: Encoding | None
    to_store: int  # bytes
    faults: tuple[str, ...]


def tell(plan: Plan, as_json: bool) -> None:
    """Print it; InputError, after all that can be told, for what stands in the way."""
    if as_json:
        print_json(as_object(plan))
    else:
        write(plan)
    if plan.faults:
        raise InputError("\n".join(plan.faults))


def as_object(plan: Plan) -> dict[str, object]:
    """The plan in plain values."""
    told = asdict(plan)
    if plan.training is not None:
        layout = plan.training.layout
        told["training"]["layout"] |= {"peak_bytes": layout.peak_bytes, "in_words": layout.in_words()}
    if plan.together is not None:
        layout = plan.together.layout
        told["together"]["layout"] |= {"peak_bytes": layout.peak_bytes, "in_words": layout.in_words()}
    if plan.encoding is not None:
        for kind, entries in plan.encoding.entries.items():
            told["encoding"]["entries"][kind]["missing"] = len(entries.missing)
    return told


def make(config: Config, hash_weights: bool) -> Plan:
    """Find everything out."""
    seen = look(config, hash_weights)
    faults = list(seen.faults)
    training = _training(config, seen, faults)
    return whole(config, seen, training, [(config, training.disk_bytes if training else 0)], faults)


def whole(
    config: Config,
    seen: Seen,
    training: Training | Together | None,
    to_runs: Sequence[tuple[Config, int]],
    faults: Sequence[str],
) -> Plan:
    """The plan of what was seen and of a training, which writes so many bytes to each run."""
    return Plan(
        model=f"{spec.name_of(seen.places) or 'a model that is not in the catalogue'}, {seen.places.root}",
        store=seen.store.name,
        store_exists=seen.exists,
        budget_bytes=memory.budget_bytes(config.memory.budget),
        encoding=seen.encoding,
        training=training if isinstance(training, Training) else None,
        together=training if isinstance(training, Together) else None,
        disks=_disks(config, seen.to_store, to_runs),
        faults=tuple(faults),
    )


def look(config: Config, hash_weights: bool) -> Seen:
    """Find out what there is of data, model and store, and what stage one would do with them."""
    model = config.model
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    store, exists = _peek(config.cache.path)
    record = _record(store, config) if exists else None
    faults: list[str] = []
    encoding, known, to_store = None, None, 0
    if record is None or not _is_training_machine(config, places):
        job = commands.encode_job(config, lambda: store)
        known = forecast.forecast(job, _hash if hash_weights else None)
        encoding = _encoding(job, known, store if exists else None, config, faults)
        missing = {kind: entries.missing for kind, entries in encoding.entries.items()}
        to_store = forecast.stored_bytes(job, known, missing, config.cache.codec)
    return Seen(
        places=places,
        store=store,
        exists=exists,
        record=record,
        known=known,
        encoding=encoding,
        to_store=to_store,
        faults=tuple(faults),
    )


def _peek(path: str) -> tuple[Store, bool]:
    """The store, and whether there is one; where there is none, it only has a name."""
    root = Path(path).expanduser()
    if "://" in path or root.exists():
        return cache.open(path), True
    return Store(Folder(root.resolve())), False


def _record(store: Store, config: Config) -> SetRecord | None:
    try:
        return find_set(store, config)
    except InputError:
        return None


def _is_training_machine(config: Config, places: "ModelFolders") -> bool:
    """Whether stage one cannot run here: no data or no encoders."""
    is_data_here = all(Path(options.path).expanduser().exists() for options in config.data)
    return not is_data_here or any(part != "transformer" for part in places.missing())


def _hash(tensors: Tensors) -> None:
    """Hash weights with a bar."""
    size = identity.size_of(tensors)
    with tqdm(total=size, desc="hashing", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        identity.remember(tensors, bar.update)


def _encoding(job: Job, known: Forecast, store: Store | None, config: Config, faults: list[str]) -> Encoding:
    entries = _compare(job, known, store, set_request(config))
    captions = images = None
    try:
        if entries["text"].missing:
            captions = forecast.text_phase(job, known, entries["text"].missing)
        if entries["latents"].missing:
            images = forecast.image_phase(job, known, entries["latents"].missing)
    except InputError as error:
        faults.append(f"encode: {error}")
    survey = known.survey
    return Encoding(
        data=Data(
            pictures=len(job.samples),
            captions=sum(len(sample.captions) for sample in job.samples),
            buckets=tuple((width, height, count) for (width, height), count in survey.buckets.items()),
            remarks=(*list(survey.lines())[len(survey.buckets) :], *known.notes),
        ),
        text_encoder=known.encoder,
        to_hash_bytes=0 if known.encoder else identity.size_of(known.tensors),
        entries=entries,
        captions=captions,
        images=images,
    )


def _compare(job: Job, known: Forecast, store: Store | None, request: Mapping[str, object]) -> dict[str, Entries]:
    want, is_open = known.want, known.encoder is None
    records = store.sets() if store is not None else []
    previous = next((record for record in records if record.body["request"] == request), None)
    replaced = lacking.replaced(want.samples, previous)
    wanted = {
        "text": want.text,
        "latents": {key: of.key for key, of in want.latents.items()},
        "masks": {key: of.key for key, of in want.masks.items()},
    }
    return {
        kind: lacking.compare(
            store,
            lacking.Question(kind=kind, wanted=keys, is_open=is_open and kind == "text", replaced=replaced),
        )
        for kind, keys in wanted.items()
        if keys or kind != "masks"
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainable:
    """What a training would begin with."""

    spec: "spec.TransformerSpec"
    items: Sequence[Item]
    load: Load
    adapter: int  # weights
    done: int  # steps

    def disk_bytes(self, config: Config) -> int:
        """What the steps to come write at most."""
        return warnings.run_bytes(self.adapter, config.train, config.save, max(0, config.train.steps - self.done))


def trainable(config: Config, seen: Seen, faults: list[str]) -> Trainable | None:
    """None where there is nothing to train on yet, or no transformer, which is a fault."""
    places = seen.places
    if not folders.is_there("transformer", places.transformer):
        faults.append(f"train: {places.transformer} holds no transformer")
        return None
    transformer = spec.read_transformer_spec(places.transformer)
    found, rows = _items(config, seen.known, seen.record)
    if not found:
        return None
    adapter = lora.size(transformer, config.lora)
    options = LayoutOptions(
        train=config.train,
        memory=config.memory,
        previews=config.previews,
        dropout=config.lora.dropout,
        kind=config.lora.kind,
    )
    saved = checkpoint.saved(config.run.folder / "checkpoints")
    return Trainable(
        spec=transformer,
        items=found,
        load=load_for(found, rows, adapter, options, stock_of(places.transformer, transformer)),
        adapter=adapter,
        done=int(saved[-1].name) if saved else 0,
    )


def _training(config: Config, seen: Seen, faults: list[str]) -> Training | None:
    of = trainable(config, seen, faults)
    if of is None:
        return None
    try:
        layout = choose(of.spec, of.load, config.memory, memory.budget_bytes(config.memory.budget))
    except InputError as error:
        faults.append(f"train: {error}")
        return None
    pace = figures.recall("steps", pace_of(of.spec, layout, config.train))
    return Training(
        steps=config.train.steps,
        done=of.done,
        pictures=len({item.id for item in of.items}),
        layout=layout,
        seconds=max(0, config.train.steps - of.done) / pace.per_second if pace else None,
        disk_bytes=of.disk_bytes(config),
        warnings=tuple(warned(config, seen.places, of)),
    )


def warned(config: Config, places: "ModelFolders", of: Trainable) -> Iterator[str]:
    """What a night may be lost on."""
    yield from warnings.of_model(of.spec, spec.is_distilled(places.root, config.model.name))
    yield from filter(None, [advice(config.train)])
    yield from warnings.of_options(config.train, config.lora)
    yield from warnings.of_data(of.items, config.train)


def _items(config: Config, known: Forecast | None, record: SetRecord | None) -> tuple[list[Item], int]:
    """What would be trained on, and the text rows: as stage one will list it, else as the set has it."""
    if known is not None:
        return list(items({"samples": known.want.samples})), known.text.length
    if record is None:
        return [], 0
    store = cache.open(config.cache.path)
    rows = int(store.header("text", record.body["shared"]["empty"]).attributes["key"]["max_length"])
    return list(items(record.body)), rows


def _disks(config: Config, to_store: int, to_runs: Sequence[tuple[Config, int]]) -> tuple[Disk, ...]:
    """What goes where; places on one disk are taken together."""
    found: dict[int, Disk] = {}
    is_local = "://" not in config.cache.path
    wanted = [(config.cache.path, to_store)] if is_local else []
    for path, needed in [*wanted, *((str(of.run.folder), needed) for of, needed in to_runs)]:
        place = _existing(Path(path).expanduser())
        device, free = os.stat(place).st_dev, max(0, shutil.disk_usage(place).free - _KEPT_FREE)
        before = found.get(device, Disk(places=(), needed_bytes=0, free_bytes=free))
        found[device] = replace(before, places=(*before.places, path), needed_bytes=before.needed_bytes + needed)
    return tuple(found.values())


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
