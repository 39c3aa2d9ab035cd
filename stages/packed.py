"""Models that MLX has quantized before: how each of their matrices is packed, told by the file.

A matrix is packed if and only if `<path>.scales` is there (`mlx.nn.quantize`, as mlx-lm and mlx-vlm write it); bits and
group size follow from the shapes, the mode from the type of the scales. The folder's config.json may say the same once
more, module by module; where it says something else, its files belong to two downloads.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.weights import FLOATS, Tensors, listing

MICROSCALED = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
"""(bits, group) -> mode, where scales are single bytes."""
_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_DEFAULTS = {"affine": (4, 64), "nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32)}


@dataclass(frozen=True, order=True, slots=True)
class Packing:
    """How one matrix is packed; the names of the settings of `mlx.nn.quantize`."""

    bits: int
    group_size: int
    mode: str

    def in_words(self) -> str:
        """For the log."""
        return f"{self.mode} {self.bits} bit, groups of {self.group_size}"


def packings(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Packing]:
    """Module path -> packing of those of the matrices `shapes` (unpacked, by name) that are packed.

    InputError lists every one whose parts do not fit together.
    """
    found, faults = {}, []
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in tensors.info:
            packing = _packing(tensors, path, shape)
            if isinstance(packing, Packing):
                found[path] = packing
            else:
                faults.append(f"{path}: {packing}")
    if faults:
        raise InputError(listing(f"{tensors.source} holds matrices that MLX cannot have packed:", faults))
    return found


def parts(packing: Packing) -> tuple[str, ...]:
    """What the tensors of a packed matrix are called."""
    return ("weight", "scales", "biases") if packing.mode == "affine" else ("weight", "scales")


def _packing(tensors: Tensors, path: str, shape: tuple[int, ...]) -> Packing | str:
    """The packing of a matrix [out, in], or what is wrong with it."""
    weight, scales = tensors.info.get(f"{path}.weight"), tensors.info[f"{path}.scales"]
    if weight is None:
        return "has scales, but no weight"
    if weight.dtype != "U32" or len(shape) != 2 or len(weight.shape) != 2 or len(scales.shape) != 2:
        return f"has scales, but its weight is {weight.dtype} of shape {list(weight.shape)}"
    (rows, columns), words, groups = shape, weight.shape[1], scales.shape[1]
    if weight.shape[0] != rows or scales.shape[0] != rows or not groups or 32 * words % columns or columns % groups:
        return f"weight {list(weight.shape)} and scales {list(scales.shape)} do not stand for {list(shape)}"
    bits, group = 32 * words // columns, columns // groups
    if scales.dtype == "U8" and (bits, group) in MICROSCALED:
        return Packing(bits, group, MICROSCALED[bits, group])
    if scales.dtype not in FLOATS or bits not in _AFFINE_BITS or group not in _AFFINE_GROUPS:
        return f"{bits} bit in groups of {group} with scales of type {scales.dtype} is no packing of MLX"
    biases = tensors.info.get(f"{path}.biases")
    if biases is None or biases.shape != scales.shape or biases.dtype not in FLOATS:
        return "its biases are missing or do not match its scales"
    return Packing(bits, group, "affine")


def summary(found: Mapping[str, Packing]) -> Packing | None:
    """The packing that most matrices have; None where none is packed."""
    counted = Counter(found.values())
    return max(counted, key=lambda packing: (counted[packing], packing)) if counted else None


def check_settings(place: Path, tensors: Tensors, found: Mapping[str, Packing]) -> None:
    """Refuse a folder whose config.json says of a packed matrix something else than its tensors."""
    path = place / "config.json"
    settings = _settings(path) if found and path.is_file() else {}
    faults = []
    for module, packing in found.items():
        named = tensors.info[f"{module}.weight"].name.removesuffix(".weight")
        said = settings.get(named, settings)
        if isinstance(said, Mapping) and (declared := _declared(said)) not in (None, packing):
            faults.append(f"{named}: {declared.in_words()} by the config, {packing.in_words()} in the file")
    if faults:
        raise InputError(listing(f"{path} does not belong to the weights beside it; download both again:", faults))


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8")).get("quantization")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download it again") from None
    return settings if isinstance(settings, dict) else {}


def _declared(said: Mapping[str, Any]) -> Packing | None:
    """The packing that an entry declares; old files leave out the mode, which then is affine."""
    mode = said.get("mode", "affine")
    if mode not in _DEFAULTS or not {"bits", "group_size", "mode"} & set(said):
        return None
    bits, group = _DEFAULTS[mode]
    return Packing(said.get("bits", bits), said.get("group_size", group), mode)


def read(tensors: Tensors, found: Mapping[str, Packing], dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """The tensors of packed matrices by name, lazy but for the scales, whose type becomes `dtype` if they are floats.

    InputError where a scale or bias is not finite: it would spoil everything.
    """
    names = [f"{path}.{part}" for path, packing in found.items() for part in parts(packing)]
    values = tensors.read_all(names)
    for path, packing in found.items():
        small = {part: values[f"{path}.{part}"] for part in parts(packing)[1:]}
        if not all(is_finite(part, packing) for part in small.values()):
            raise InputError(f"{tensors.source}: {path} has scales that are not finite; download the file again")
        yield f"{path}.weight", values[f"{path}.weight"]
        for part, value in small.items():
            yield f"{path}.{part}", value.astype(dtype) if packing.mode == "affine" else value


def unpack(values: Mapping[str, mx.array], packing: Packing, source: Path) -> mx.array:
    """A matrix [out, in] in float32 from its tensors by part; InputError where its scales are not finite."""
    if not all(is_finite(value, packing) for part, value in values.items() if part != "weight"):
        raise InputError(f"{source}: the embedding has scales that are not finite; download the file again")
    return mx.dequantize(
        values["weight"],
        values["scales"],
        values.get("biases"),
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        dtype=mx.float32,
    )


def is_finite(values: mx.array, packing: Packing) -> bool:
    """Whether scales or biases are finite; those of a byte have codes for not-a-number."""
    if packing.mode == "affine":
        return bool(mx.isfinite(values).all().item())
    if packing.mode == "nvfp4":  # e4m3: all ones but the sign
        return not bool(((values & 0x7F) == 0x7F).any().item())
    return not bool((values == 0xFF).any().item())  # e8m0
