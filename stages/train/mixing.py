"""Several adapter files on one transformer, each at a strength: their updates add up.

The sum of low-rank updates is one of the ranks together, so nothing is rounded but each product with its strength:
s1 k1 B1 A1 + s2 k2 B2 A2 = [s1 k1 B1, s2 k2 B2] [A1; A2], where k is alpha / rank as the file has it. An update at
strength 0 is left out altogether: the base's own bits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_file
from flux2_relay.stages.train.adapter_file import Factors
from flux2_relay.stages.train.kinds import Adapter, Lora

Updates = Mapping[str, Factors]
"""What one file does: module path -> its update."""


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


def mix(updates: Sequence[Updates], strengths: Sequence[float]) -> dict[str, Adapter]:
    """What to attach: module path -> (A, B, 1), the ranks of all updates of a module side by side, float32."""
    parts: dict[str, list[tuple[mx.array, mx.array]]] = {}
    for of_file, strength in zip(updates, strengths, strict=True):
        for path, factors in of_file.items() if strength else ():
            parts.setdefault(path, []).append((factors.a, factors.b * (factors.scale * strength)))
    mixed = {path: _beside(pairs) for path, pairs in parts.items()}
    mx.eval(mixed)
    return mixed


def _beside(pairs: Sequence[tuple[mx.array, mx.array]]) -> Adapter:
    factors_a, factors_b = zip(*pairs, strict=True)
    both = mx.concatenate(list(factors_a), axis=0), mx.concatenate(list(factors_b), axis=1)
    return Lora(*both, mx.array(1.0, mx.float32))


def size(updates: Sequence[Updates]) -> int:
    """Bytes of all factors together."""
    return sum(factors.a.nbytes + factors.b.nbytes for of_file in updates for factors in of_file.values())
