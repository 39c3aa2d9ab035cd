"""Checkpoints: everything that the next step depends on, in a folder that appears whole.

    checkpoints/000250/adapter.safetensors     A and B, float32, alpha not folded in
    checkpoints/000250/optimizer.safetensors   moments, and whatever else the rule remembers
    checkpoints/000250/ema.safetensors         the running mean of the adapter, where `train.ema` asks for one
    checkpoints/000250/state.json              the fields of `State`
    checkpoints/000250/SHA256SUMS              of the files above, as `sha256sum -c` reads it
    checkpoints/best                           the step of the checkpoint with the least held-out loss

Order, noise, sigma, captions and dropout are functions of (seed, step, item), and so is the learning rate of its step:
the step is all the position there is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

import mlx.core as mx

from flux2_relay.cache import durable
from flux2_relay.cache.errors import InputError
from flux2_relay.stages.files import read_tensors, write_json, write_tensors

_ASIDE = ".new-"
SUMS = "SHA256SUMS"
"""A safetensors file whose values have changed still reads well: only a checksum notices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a checkpoint says of itself."""

    step: int  # steps done, those skipped included
    seed: int
    set: str  # key of the set that was trained on
    data: str = ""  # digest of what of that set training reads
    config: Mapping[str, object] = field(default_factory=dict)  # key -> value, as resolved
    blas_threads: int | None = None  # on a CPU they decide the last bits of products
    skipped: int = 0  # steps skipped in a row up to this one
    best_step: int | None = None  # that of the least held-out loss so far
    best_loss: float | None = None
    has_ema: bool = False
    ranks: int = 1  # processes that trained together


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One checkpoint in memory."""

    state: State
    adapter: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]
    ema: Mapping[str, mx.array] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the adapter's file, for other readers


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under `folder` and remove all but the best and the `keep` newest -> its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"{_ASIDE}*"):  # of a process that was killed while it saved
        durable.remove_folder(unfinished)
    aside, place = folder / f"{_ASIDE}{uuid4().hex}", folder / f"{checkpoint.state.step:06d}"
    aside.mkdir()
    try:
        write_tensors(aside / "adapter.safetensors", checkpoint.adapter, checkpoint.metadata)
        write_tensors(aside / "optimizer.safetensors", checkpoint.optimizer, {})
        if checkpoint.ema is not None:
            write_tensors(aside / "ema.safetensors", checkpoint.ema, {})
        write_json(aside / "state.json", asdict(checkpoint.state))
        sums = [f"{_sum(file)}  {file.name}\n" for file in sorted(aside.iterdir())]
        durable.write_and_sync(aside / SUMS, "".join(sums).encode())
        durable.sync_folder(aside)
        if place.exists():  # written again after a resume from an older one
            shutil.rmtree(place)
        os.rename(aside, place)
        durable.sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    spared = checkpoint.state.best_step
    for old in saved(folder)[:-keep]:
        if int(old.name) != spared:
            shutil.rmtree(old, ignore_errors=True)
    return place


def mark_best(folder: Path, step: int | None) -> None:
    """Say in `best` which step's checkpoint has the least held-out loss; None takes the mark away."""
    mark = folder / "best"
    if step is None:
        mark.unlink(missing_ok=True)
        return
    aside = folder / f"{_ASIDE}best"
    aside.write_text(f"{step:06d}\n", "utf-8")
    os.replace(aside, mark)


def best(folder: Path) -> Path | None:
    """The checkpoint that is marked as the best, if there is one."""
    try:
        place = folder / (folder / "best").read_text("utf-8").strip()
    except OSError:
        return None
    return place if place.is_dir() else None


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
    for name in _sums(path):
        check_sum(path, name)
    state = load_state(path)
    adapter, metadata = read_tensors(path / "adapter.safetensors")
    optimizer, _ = read_tensors(path / "optimizer.safetensors")
    ema = read_tensors(path / "ema.safetensors")[0] if state.has_ema else None
    return Checkpoint(state=state, adapter=adapter, optimizer=optimizer, ema=ema, metadata=metadata)


def load_state(path: Path) -> State:
    """What a checkpoint says of itself; its tensors are not read."""
    check_sum(path, "state.json")
    try:
        return State(**json.loads((path / "state.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: its state.json cannot be read ({error})") from None


def check_sum(path: Path, name: str) -> None:
    """Refuse a file that is not what was written; InputError. A file without a checksum passes."""
    expected = _sums(path).get(name)
    try:
        is_same = expected is None or _sum(path / name) == expected
    except OSError as error:
        raise InputError(f"{path / name}: cannot be read ({error})") from None
    if not is_same:
        raise InputError(f"{path / name}: is damaged, its bytes are not those that were written")


def _sums(path: Path) -> dict[str, str]:
    """File name -> checksum; nothing for a checkpoint of a release that wrote none."""
    try:
        lines = (path / SUMS).read_text("utf-8").splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path / SUMS}: cannot be read ({error}); the checkpoint is damaged") from None


def _sum(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
