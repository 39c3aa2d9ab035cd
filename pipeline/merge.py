"""`relay merge`: base and adapters as one folder in the layout of diffusers.

The transformer is written anew, a stretch of rows at a time; the rest of the pipeline is copied, or linked. All of it
appears under its name at once, or not at all.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from tqdm import tqdm

from flux2_relay.cache import durable
from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.run_folder import say
from flux2_relay.stages import folders, model_folder, spec
from flux2_relay.stages.files import write_json
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import merge as merging
from flux2_relay.stages.train import mixing

DTYPES: dict[str, Literal["BF16", "F32"]] = {"bf16": "BF16", "float32": "F32"}
"""What `--dtype` takes -> the type's name in the files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rest:
    """What of a model goes along with its transformer: its index, and the folders of its other parts."""

    index: dict[str, object]
    folders: dict[str, Path]
    missing: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for place in self.folders.values() for file in place.rglob("*"))


def merge(config: Config, adapters: Sequence[tuple[Path, float]], out: Path, dtype: str, link: bool) -> None:
    """Write the model of `config` with `adapters`, each at a strength, to the new folder `out`."""
    places = folders.find(config.model.path, vae=config.model.vae)
    sizes = spec.read_transformer_spec(places.transformer)
    base = merging.open_dense(places.transformer, sizes)
    updates = mixing.read_all([mixing.locate(path) for path, _ in adapters], sizes)
    changes = mixing.changes_of(updates, [strength for _, strength in adapters])
    shards, rest = merging.plan(sizes, DTYPES[dtype]), _rest(places, sizes, config.model.name)
    _refuse(out, shards.total + (0 if link else rest.bytes))
    aside = out.parent / f".new-{uuid4().hex}"
    try:
        _begin_transformer(aside / "transformer", places, sizes)
        with tqdm(total=shards.total, desc="merge", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
            merging.merge(base, changes, shards, aside / "transformer", bar.update)
        _write_rest(aside, rest, link)
        durable.sync_folder(aside)
        aside.rename(out)
        durable.sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    say(f"{out}: {len(changes)} of {len(base.info)} matrices changed; transformer {in_words(shards.total)}, {dtype}")
    if rest.missing:
        say(
            f"not taken along, since {places.root} has no folder of that name: {', '.join(rest.missing)}; diffusers "
            "loads the folder once these are given to it (model_index.json says null)"
        )


def _refuse(out: Path, needed: int) -> None:
    """What can be refused before a weight is read."""
    if out.exists():
        raise InputError(f"{out} is there already; choose another name for the merged model")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(f"{out.parent}: the merged model takes {in_words(needed)}, and {in_words(free)} are free")


def _rest(places: ModelFolders, sizes: TransformerSpec, name: str) -> _Rest:
    root = places.root.parent if places.root.is_file() else places.root
    found = model_folder.read_index(root)
    parts = model_folder.parts_of(sizes, found)
    there = {part: root / part for part in parts if (root / part).is_dir()}
    missing = tuple(part for part in parts if part not in there and part != "scheduler")
    known = frozenset({*there, "transformer", "scheduler"})
    distilled = spec.is_distilled(places.root, name)
    return _Rest(index=model_folder.index_of(sizes, found, known, distilled), folders=there, missing=missing)


def _begin_transformer(folder: Path, places: ModelFolders, sizes: TransformerSpec) -> None:
    """The folder with its config: the checkpoint's own where it has one."""
    folder.mkdir(parents=True)
    config = places.transformer / "config.json"
    if config.is_file():
        shutil.copyfile(config, folder / "config.json")
    else:
        write_json(folder / "config.json", model_folder.transformer_config(sizes))


def _write_rest(aside: Path, rest: _Rest, link: bool) -> None:
    for part, place in rest.folders.items():
        if link:
            (aside / part).symlink_to(place.resolve(), target_is_directory=True)
        else:
            shutil.copytree(place, aside / part, copy_function=_copy)  # links of the Hugging Face cache become files
    if "scheduler" not in rest.folders:
        (aside / "scheduler").mkdir()
        write_json(aside / "scheduler" / "scheduler_config.json", model_folder.SCHEDULER)
    write_json(aside / "model_index.json", rest.index)


def _copy(source: str, target: str) -> None:
    """One file, on the disk before its folder has its name."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
