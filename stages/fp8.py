"""Weights as 8-bit floats (fp8, e4m3) in the single files that ComfyUI and BFL offer, made dense as they are read.

Either a plain cast, or with a scale beside the weight: `PATH.weight` times `PATH.weight_scale`, in older files
`PATH.scale_weight`; one number, or one a row. What else such files hold serves cards that multiply in fp8: scales of
the inputs, and what the file says of itself. Other forms of packing are refused by name of what to take instead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.catalogue import PartName, download
from flux2_relay.stages.weights import FLOATS, FP8, TensorInfo, Tensors, listing

_SCALES = (".weight_scale", ".scale_weight")
_NOT_NEEDED = (".input_scale", ".scale_input", ".comfy_quant")
_MARK = "scaled_fp8"


def with_scales(tensors: Tensors, part: PartName) -> Tensors:
    """The same tensors, those that are scaled joined to their scales, without what only fp8 arithmetic needs.

    InputError names every tensor of a form that is not read, and what to download for `part` instead.
    """
    kept = {name: info for name, info in tensors.info.items() if name != _MARK and not name.endswith(_NOT_NEEDED)}
    scales = {_of(name): info for name, info in kept.items() if name.endswith(_SCALES)}
    if not scales and not any(info.dtype.startswith("F8_") for info in kept.values()):
        return tensors
    kept = {name: info for name, info in kept.items() if not name.endswith(_SCALES)}
    faults = list(_faults(kept, scales))
    if faults:
        title = f"{tensors.source} is quantized in a way that is not read here; {download(part, None)}:"
        raise InputError(listing(title, faults))
    return Tensors(tensors.source, {name: _joined(info, scales.get(name)) for name, info in kept.items()})


def is_fp8(tensors: Tensors) -> bool:
    """Whether any of these tensors is made of 8-bit floats."""
    return any(info.dtype == FP8 for info in tensors.info.values())


def _of(scale: str) -> str:
    """The name of the weight that a scale belongs to."""
    return f"{scale.rpartition('.')[0]}.weight"


def _joined(info: TensorInfo, scale: TensorInfo | None) -> TensorInfo:
    return info if scale is None else replace(info, scale=scale)


def _faults(kept: Mapping[str, TensorInfo], scales: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name, info in kept.items():
        if info.dtype.startswith("F8_") and info.dtype != FP8:
            yield f"{name} has type {info.dtype}"
    for name, scale in scales.items():
        weight = kept.get(name)
        if weight is None:
            yield f"{scale.name} has no weight beside it"
        elif weight.dtype != FP8:
            yield f"{name} of type {weight.dtype} has a scale beside it"
        elif scale.dtype not in FLOATS or scale.shape not in ((), (1,), weight.shape[:1], (*weight.shape[:1], 1)):
            yield f"{name} is scaled in blocks ({scale.dtype} of shape {list(scale.shape)})"
