"""Checkpoints: everything that the next step depends on, in a folder that appears whole.

    checkpoints/000250/adapter.safetensors     A and B, float32, alpha not folded in
    checkpoints/000250/optimizer.safetensors   moments
    checkpoints/000250/state.json              step, seed, the set it trains on

Order, noise, sigma and captions are functions of (seed, step, item), so the step is all the position there is.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import mlx.core as mx

from flux2_relay.cache import durable
from flux2_relay.cache.errors import InputError
from flux2_relay.stages.files import read_tensors, write_json, write_tensors

_ASIDE = ".new-"


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a checkpoint says of itself."""

    step: int  # updates done
    seed: int
    set: str  # key of the set that was trained on


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One checkpoint in memory."""

    state: State
    adapter: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under `folder` and remove all but the `keep` newest -> its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"{_ASIDE}*"):  # of a process that was killed while it saved
        shutil.rmtree(unfinished, ignore_errors=True)
    aside, place = folder / f"{_ASIDE}{uuid4().hex}", folder / f"{checkpoint.state.step:06d}"
    aside.mkdir()
    try:
        write_tensors(aside / "adapter.safetensors", checkpoint.adapter, {})
        write_tensors(aside / "optimizer.safetensors", checkpoint.optimizer, {})
        write_json(aside / "state.json", asdict(checkpoint.state))
        durable.sync_folder(aside)
        if place.exists():  # written again after a resume from an older one
            shutil.rmtree(place)
        os.rename(aside, place)
        durable.sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in saved(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; what a killed process left unfinished does not count."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence about each newer one that is not."""
    complaints = []
    for path in reversed(saved(folder)):
        try:
            return load(path), complaints
        except InputError as error:
            complaints.append(f"{error}; going back to the checkpoint before it")
    return None, complaints


def load(path: Path) -> Checkpoint:
    """One checkpoint folder; InputError where a file of it is missing or damaged."""
    try:
        state = State(**json.loads((path / "state.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: its state.json cannot be read ({error})") from None
    adapter, _ = read_tensors(path / "adapter.safetensors")
    optimizer, _ = read_tensors(path / "optimizer.safetensors")
    return Checkpoint(state=state, adapter=adapter, optimizer=optimizer)
