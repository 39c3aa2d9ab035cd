"""Several adapter files on one transformer, each at a strength: their updates add up.

The sum of low-rank updates is one of the ranks together, so nothing is rounded but each product with its strength:
s1 k1 B1 A1 + s2 k2 B2 A2 = [s1 k1 B1, s2 k2 B2] [A1; A2], where k is alpha / rank as the file has it. Where a module
has updates of other kinds, each changes the base alone, and the changes add up. An update at strength 0 is left out
altogether: the base's own bits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_file, visits
from flux2_relay.stages.train.dora_update import DoraUpdate
from flux2_relay.stages.train.kinds import Adapter, Sum
from flux2_relay.stages.train.transformer import Transformer
from flux2_relay.stages.train.updates import Factors, Update, Updates

Changes = Sequence[tuple[Update, float]]
"""What happens to one module: updates, each at a strength."""


def locate(named: Path) -> Path:
    """The LoRA file that a user means: itself, or that of a run or checkpoint folder."""
    path = named.expanduser()
    if not path.is_dir():
        return path
    inside = path / "adapter.safetensors"
    if not inside.is_file():
        raise InputError(
            f"{path}: a folder without adapter.safetensors; name a LoRA file, or a run that `relay train` finished"
        )
    return inside


def read_all(files: Sequence[Path], spec: TransformerSpec) -> list[Updates]:
    """The updates of each file; one InputError says what is wrong with any of them."""
    found, faults = [], []
    for file in files:
        try:
            found.append(adapter_file.read(file, spec))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return found


def measured(of_file: Updates, transformer: Transformer) -> dict[str, Update]:
    """The updates with what they must know of the base; those of DoRA alone must."""
    found = dict(of_file)
    there = {path: update for path, update in of_file.items() if isinstance(update, DoraUpdate)}
    for path, weight in visits.linears(transformer, there):
        found[path] = there[path].measured(visits.stretches(weight, there[path].low.a.shape[1]))
    return found


def mix(updates: Sequence[Updates], strengths: Sequence[float]) -> dict[str, Adapter]:
    """What to attach: module path -> one adapter, float32; for LoRA the ranks of all side by side."""
    mixed = {path: _as_one(changes) for path, changes in changes_of(updates, strengths).items()}
    mx.eval(mixed)
    return mixed


def changes_of(updates: Sequence[Updates], strengths: Sequence[float]) -> dict[str, Changes]:
    """What happens to each module; low-rank updates are one already."""
    parts: dict[str, list[tuple[Update, float]]] = {}
    for of_file, strength in zip(updates, strengths, strict=True):
        for path, update in of_file.items() if strength else ():
            parts.setdefault(path, []).append((update, strength))
    return {path: _together(changes) for path, changes in parts.items()}


def _together(changes: Changes) -> Changes:
    low = [update.scaled(strength) for update, strength in changes if isinstance(update, Factors)]
    others = [(update, strength) for update, strength in changes if not isinstance(update, Factors)]
    if not low:
        return others
    a, b = mx.concatenate([part.a for part in low], axis=0), mx.concatenate([part.b for part in low], axis=1)
    return [(Factors(a, b, 1.0), 1.0), *others]


def _as_one(changes: Changes) -> Adapter:
    if len(changes) == 1 and changes[0][1] == 1.0:
        return changes[0][0].adapter()
    parts = tuple(update.adapter() for update, _ in changes)
    strengths = tuple(mx.array(strength, mx.float32) for _, strength in changes)
    return cast(Adapter, Sum(parts, strengths))  # of what is only drawn with, nothing is asked but `apply`


def size(updates: Sequence[Updates]) -> int:
    """Bytes of all factors together."""
    return sum(array.nbytes for of_file in updates for update in of_file.values() for array in update.arrays())
