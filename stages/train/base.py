"""The base's weights as a checkpoint has them: dense, or packed by MLX before, matrix by matrix.

What is packed stays as it is, unless fewer bits are asked for: more would cost memory and bring nothing back. Whether
a matrix is packed, and how, its tensors say (`stages/packed.py`); blocks are read one at a time either way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import names, packed, quantize
from flux2_relay.stages.packed import Packing
from flux2_relay.stages.quantize import Weight
from flux2_relay.stages.weights import Tensors

Shapes = Mapping[str, tuple[int, ...]]
"""Name without `.weight` -> shape of the dense tensor."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How a checkpoint has packed one matrix, and the bytes of its parts."""

    packing: Packing
    bytes: int

    def stays(self, bits: int) -> bool:
        """Whether it is held as it is where `bits` are asked for."""
        return self.packing.bits <= bits


Stock = Mapping[str, Stored]
"""Name without `.weight` -> how it is packed; an ordinary checkpoint's is empty."""


def open_base(place: Path, shapes: Shapes) -> Tensors:
    """The tensors of a transformer's folder or file under diffusers' names; headers alone are read.

    InputError lists every tensor that is missing, surplus or misshapen, and each packed one that does not fit.
    """
    tensors = names.open_transformer(place)
    found = _packings(tensors, shapes)
    packed.check_settings(place if place.is_dir() else place.parent, tensors, found)
    of_packed = {f"{path}.{part}" for path, packing in found.items() for part in packed.parts(packing)}
    dense = {f"{name}.weight": shape for name, shape in shapes.items() if name not in found}
    tensors.check(dense, ignore=lambda name: name in of_packed)
    return tensors


def stock(tensors: Tensors, shapes: Shapes) -> Stock:
    """How the checkpoint has packed what is packed."""

    def size(name: str) -> int:
        return sum(end - start for start, end in tensors.info[name].ranges)

    return {
        path: Stored(packing, sum(size(f"{path}.{part}") for part in packed.parts(packing)))
        for path, packing in _packings(tensors, shapes).items()
    }


def summary(stored: Stock, bits: int) -> str:
    """How most matrices are packed, in words, where they stay so; else empty."""
    packing = packed.summary({path: one.packing for path, one in stored.items() if one.stays(bits)})
    return "" if packing is None else f"as stored ({packing.in_words()})"


def held_bytes(shapes: Shapes, bits: int, stored: Stock) -> int:
    """What these tensors take in memory."""
    kept = {path: one.bytes for path, one in stored.items() if path in shapes and one.stays(bits)}
    return sum(kept.values()) + quantize.packed_bytes((s for path, s in shapes.items() if path not in kept), bits)


def read(tensors: Tensors, prefix: str, shapes: Shapes, bits: int) -> dict[str, Weight]:
    """The weights below `prefix` by their names inside it, at `bits`, evaluated.

    InputError where a scale or bias is not finite: it would spoil everything.
    """
    found = _packings(tensors, {f"{prefix}{name}": shape for name, shape in shapes.items()})
    wanted = {name: _parts(f"{prefix}{name}", found) for name in shapes}
    values = tensors.read_all(part for parts in wanted.values() for part in parts)
    weights: dict[str, Weight] = {}
    for name, shape in shapes.items():
        parts, packing = tuple(values.pop(part) for part in wanted[name]), found.get(f"{prefix}{name}")
        if packing is not None and not all(packed.is_finite(part, packing) for part in parts[1:]):
            raise InputError(f"{tensors.source}: {prefix}{name} has scales that are not finite; download it again")
        if packing is not None and packing.bits <= bits:
            weights[name] = parts
        elif len(shape) == 2:
            whole = parts[0] if packing is None else quantize.dense(parts, shape[1], mx.float32)
            weights[name] = quantize.pack(whole, bits)
            mx.eval(weights[name])  # matrix by matrix: what each is packed from is let go of before the next
        else:
            weights[name] = parts[0]
    mx.eval(weights)
    return weights


def tensors_below(tensors: Tensors, prefix: str, shapes: Shapes) -> list[str]:
    """The names of all tensors that `read` would read."""
    found = _packings(tensors, {f"{prefix}{name}": shape for name, shape in shapes.items()})
    return [part for name in shapes for part in _parts(f"{prefix}{name}", found)]


def is_repacked(tensors: Tensors, prefix: str, shapes: Shapes, bits: int) -> bool:
    """Whether reading at `bits` quantizes any matrix."""
    found = _packings(tensors, {f"{prefix}{name}": shape for name, shape in shapes.items()})
    matrices = [f"{prefix}{name}" for name, shape in shapes.items() if len(shape) == 2]
    return any(path not in found or found[path].bits > bits for path in matrices)


def _packings(tensors: Tensors, shapes: Shapes) -> dict[str, Packing]:
    return packed.packings(tensors, {f"{path}.weight": shape for path, shape in shapes.items()})


def _parts(path: str, found: Mapping[str, Packing]) -> list[str]:
    return [f"{path}.{part}" for part in (packed.parts(found[path]) if path in found else ("weight",))]
