"""What the tensors that a file has of one module stand for: LoRA, DoRA or LoKr, of one linear or of three in one.

A module is that of a layout (`adapter_names.py`): where it stacks q, k and v, an update is cut by rows, and where it
has the halves of its rows in the other order, they are swapped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from flux2_relay.stages.train.adapter_names import Module
from flux2_relay.stages.train.dora_update import DoraUpdate
from flux2_relay.stages.train.lokr_update import LokrUpdate
from flux2_relay.stages.train.updates import Factors, Update

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class Told(Protocol):
    """What a file's header says of its updates."""

    @property
    def over_base(self) -> bool:
        """Whether lengths of DoRA are over those of the base's rows."""
        ...

    def scale(self, module: str, rank: int) -> float:
        """The strength of an update without an alpha of its own."""
        ...


@dataclass(slots=True)
class Found:
    """What a file has of one module: role -> (name in the file, value)."""

    module: Module
    tensors: dict[str, tuple[str, mx.array]] = field(default_factory=dict)

    @property
    def is_kronecker(self) -> bool:
        """Whether any of it is a factor of LoKr."""
        return any(role.startswith("w") for role in self.tensors)

    def sides(self) -> Iterator[tuple[str, int]]:
        """(A or B, the module's columns or rows) as far as the shapes tell them, whatever the kind."""
        shapes = {role: value.shape for role, (_, value) in self.tensors.items() if value.ndim == 2}
        for role, axis in (("A", 1), ("B", 0)):
            if role in shapes:
                yield role, shapes[role][axis]
            names = [next((n for n in names if n in shapes), None) for names in _ENDS[role]]
            if all(names):
                first, second = (shapes[str(name)][axis] for name in names)
                yield role, first * second


_ENDS: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "A": (("w1", "w1_b"), ("w2", "w2_b")),
    "B": (("w1", "w1_a"), ("w2", "w2_a")),
}
"""Where a Kronecker product has its columns and its rows: of W1 and W2, each whole or as two factors."""


def faults(name: str, found: Found) -> list[str]:
    """What is wrong with the tensors of one module."""
    types = [
        f"{key} has type {v.dtype}; expected floats" for key, v in found.tensors.values() if v.dtype not in _FLOATS
    ]
    if "alpha" in found.tensors and found.tensors["alpha"][1].size != 1:
        key, alpha = found.tensors["alpha"]
        types.append(f"{key}: expected one number, found {_shape(alpha)}")
    return [*types, *(_kronecker_faults(name, found) if found.is_kronecker else _low_rank_faults(name, found))]


def updates(found: Found, told: Told) -> Iterator[tuple[str, Update]]:
    """The updates of the linears that a module stands for; of tensors without faults."""
    yield from _kronecker(found, told) if found.is_kronecker else _low_rank(found, told)


def _low_rank_faults(name: str, found: Found) -> Iterator[str]:
    missing = [role for role in ("A", "B") if role not in found.tensors]
    if missing:
        yield f"{_names(found)}: {' and '.join(f'factor {role}' for role in missing)} of {name} is missing"
        return
    (a_key, a), (b_key, b) = found.tensors["A"], found.tensors["B"]
    rows, columns = found.module.shape
    rank = a.shape[0] if a.ndim == 2 else 0
    if a.ndim != 2 or a.shape[1] != columns or not rank:
        yield f"{a_key}: expected rank x {columns}, found {_shape(a)}"
    if b.ndim != 2 or b.shape[0] != rows or (rank and b.shape[1] != rank):
        yield f"{b_key}: expected {rows} x {rank or 'rank'}, found {_shape(b)}"
    if "magnitude" in found.tensors:
        key, value = found.tensors["magnitude"]
        if value.shape not in ((rows,), (rows, 1)):
            yield f"{key}: expected a length for each of {rows} rows, found {_shape(value)}; not of columns"


def _kronecker_faults(name: str, found: Found) -> Iterator[str]:
    there = found.tensors.keys() - {"alpha"}
    if strange := sorted(role for role in there if not role.startswith("w")):
        yield f"{', '.join(found.tensors[role][0] for role in strange)}: cannot stand beside factors of LoKr"
        return
    for whole in ("w1", "w2"):
        if (whole in there) + ({f"{whole}_a", f"{whole}_b"} <= there) != 1:
            yield f"{_names(found)}: lokr_{whole} of {name}, whole or as lokr_{whole}_a and lokr_{whole}_b, is missing"
            return
    flat = [key for key, value in found.tensors.values() if value.ndim != 2 and not key.endswith("alpha")]
    if flat:
        yield f"{', '.join(flat)}: expected matrices"
        return
    if any(
        _value(found, f"{w}_a").shape[1] != _value(found, f"{w}_b").shape[0] for w in ("w1", "w2") if w not in there
    ):
        yield f"{_names(found)}: the two factors of {name} have different ranks"
        return
    w1, w2, module = _matrix(found, "w1"), _matrix(found, "w2"), found.module
    shape = w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]
    if shape != module.shape:
        rows, columns = module.shape
        yield f"{_names(found)}: expected {rows} x {columns} of their product, found {shape[0]} x {shape[1]}"
    elif w1.shape[0] % _stretches(module):
        yield (
            f"{_names(found)}: a Kronecker product with {w1.shape[0]} blocks of rows cannot be cut into the "
            f"{_stretches(module)} parts of {name}"
        )


def _stretches(module: Module) -> int:
    """Stretches of rows that belong together."""
    return 2 if module.swapped else len(module.parts)


def _names(found: Found) -> str:
    return ", ".join(key for key, _ in found.tensors.values())


def _shape(value: mx.array) -> str:
    return " x ".join(map(str, value.shape)) or "a single number"


def _value(found: Found, role: str) -> mx.array:
    return found.tensors[role][1].astype(mx.float32)


def _matrix(found: Found, role: str) -> mx.array:
    return _value(found, role) if role in found.tensors else _value(found, f"{role}_a") @ _value(found, f"{role}_b")


def _scale(found: Found, told: Told, rank: int) -> float:
    if "alpha" not in found.tensors:
        return told.scale(found.module.parts[0], rank)
    return float(found.tensors["alpha"][1].reshape(())) / rank


def _kronecker(found: Found, told: Told) -> Iterator[tuple[str, Update]]:
    """Alpha counts where a factor has a rank, W2's before W1's; a matrix is cut by the rows of W1."""
    ranked = next((role for role in ("w2_b", "w1_b") if role in found.tensors), None)
    scale = 1.0 if ranked is None else _scale(found, told, _value(found, ranked).shape[0])
    w1, module = _matrix(found, "w1"), found.module
    w2 = (_value(found, "w2"),) if "w2" in found.tensors else (_value(found, "w2_a"), _value(found, "w2_b"))
    for path, part in _cut(w1, module):
        yield path, LokrUpdate(part, w2, scale)


def _cut(rows: mx.array, module: Module) -> Iterator[tuple[str, mx.array]]:
    """The rows of something [rows, ...] that belong to each linear of a module."""
    if module.swapped:
        first, second = mx.split(rows, 2, axis=0)
        rows = mx.concatenate([second, first], axis=0)
    yield from zip(module.parts, mx.split(rows, len(module.parts), axis=0), strict=True)


def _low_rank(found: Found, told: Told) -> Iterator[tuple[str, Update]]:
    """In a block-diagonal B each part uses columns of its own; the others' rows of A mean nothing to it."""
    a, rank, module = _value(found, "A"), _value(found, "A").shape[0], found.module
    scale, parts = _scale(found, told, rank), list(_cut(_value(found, "B"), module))
    lengths = dict(_cut(_value(found, "magnitude").reshape(-1), module)) if "magnitude" in found.tensors else {}
    columns = [[n for n, used in enumerate(mx.any(part != 0, axis=0).tolist()) if used] for _, part in parts]  # type: ignore[arg-type]
    if len(parts) == 1:
        columns = [list(range(rank))]
    elif not any(columns) and rank % len(parts) == 0:  # untrained: the rows of A belong to the parts in their order
        third = rank // len(parts)
        columns = [list(range(place * third, (place + 1) * third)) for place in range(len(parts))]
    for (path, part), used in zip(parts, columns, strict=True):
        if len(parts) == 1:
            low = Factors(a, part, scale)
        elif used:
            low = Factors(a[mx.array(used)], part[:, mx.array(used)], scale)
        elif lengths:
            low = Factors(a[:1], mx.zeros((part.shape[0], 1)), scale)
        else:
            continue
        yield path, DoraUpdate(low, lengths[path], told.over_base) if lengths else low
