"""Quantized blocks kept on disk, so that the next run reads a quarter of the bytes and quantizes nothing.

A file a block, named by the identity of the weights it was made from and its bits: another checkpoint, or one changed
weight, makes another file. What cannot be read is made again.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import identity
from flux2_relay.stages.files import read_tensors, write_tensors
from flux2_relay.stages.quantize import Weight
from flux2_relay.stages.train.residence import BlockWeights, Reader
from flux2_relay.stages.weights import Tensors

_PARTS = "packed", "scales", "biases"
_MARK = "|"  # between a linear's name and the part of its packed form; no tensor name has it


def keeping(read: Reader, folder: Path, tensors: Tensors, names: Mapping[int, list[str]], bits: int) -> Reader:
    """`read`, with what it gives kept in `folder`; `names` are the tensors of each block that is to be kept."""

    def read_kept(place: int) -> BlockWeights:
        if place not in names:
            return read(place)
        kept = folder / f"{identity.weights_identity(tensors, names[place], {'bits': bits})}.safetensors"
        if kept.exists():
            try:
                return _unflat(read_tensors(kept)[0])
            except InputError:  # damaged: made again below
                kept.unlink(missing_ok=True)
        weights = read(place)
        write_tensors(kept, _flat(weights), {"bits": str(bits)})
        return weights

    return read_kept


def kept_bytes(folder: Path) -> int:
    """What all kept blocks take on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def _flat(weights: BlockWeights) -> dict[str, mx.array]:
    flat: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if isinstance(weight, mx.array):
            flat[name] = weight
        else:
            flat |= {f"{name}{_MARK}{part}": value for part, value in zip(_PARTS, weight, strict=False)}
    return flat


def _unflat(flat: Mapping[str, mx.array]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for name, value in flat.items():
        linear, mark, _ = name.partition(_MARK)
        if not mark:
            weights[name] = value
        elif linear not in weights:
            parts = (flat.get(f"{linear}{_MARK}{part}") for part in _PARTS)  # biases only where the mode has them
            weights[linear] = tuple(part for part in parts if part is not None)
    return weights
