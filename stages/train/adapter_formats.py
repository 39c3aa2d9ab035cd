"""How other programs want an adapter: a table of formats, and the one algebra that serves them all.

Where a layout holds q, k and v as one matrix, A is theirs one below the other and B block-diagonal: rank 3r. Readers
divide alpha by the fused rank, so alpha is the scale times that rank: 3 alpha. Nothing else is exact, but for three
that share one A already (ai-toolkit trains so), which stay one pair of rank r.

`tests/oracle/test_adapter_formats.py` loads each format into diffusers; what others read is in `docs/adapters.md`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_names
from flux2_relay.stages.train.adapter_file import Factors
from flux2_relay.stages.train.adapter_names import Module, Modules
from flux2_relay.stages.weights import listing


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way to write an adapter."""

    name: str
    readers: str
    """Who loads it, in words."""
    modules: Callable[[TransformerSpec], Modules]
    """The names of the linears."""
    prefix: str
    separator: str
    """What stands for the dots in a module's name."""
    factors: tuple[str, str]
    """What A and B are called."""
    stores_alpha: bool
    """Whether alpha has a tensor of its own; else alpha / rank is folded into B."""
    kohya_header: bool = False
    """Whether the metadata that kohya's scripts look for are written."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Pattern of module paths -> which reader would leave the module out."""
    remarks: Mapping[str, str] = field(default_factory=dict)
    """Pattern of module paths -> what other programs than the one it is named after make of the module."""

    def key(self, module: str) -> str:
        """A module's name in the file."""
        return self.prefix + module.replace(".", self.separator)


_MISSED = "ComfyUI leaves this module out under diffusers' names; --format comfyui is read whole there"
_NOT_SWAPPED = "diffusers reads this module wrongly under BFL's names; --format diffusers is read rightly there"
_DROPPED = "diffusers drops this module under kohya's names; use --format comfyui"

FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format(
            name="diffusers",
            readers="diffusers, mflux, ComfyUI newer than October 2025",
            modules=adapter_names.diffusers,
            prefix="transformer.",
            separator=".",
            factors=("lora_A.weight", "lora_B.weight"),
            stores_alpha=False,
            remarks={"time_guidance_embed.*": _MISSED, "*_modulation*.linear": _MISSED},
        ),
        Format(
            name="comfyui",
            readers="ComfyUI (old and new, its bypass loader too), diffusers",
            modules=adapter_names.bfl,
            prefix="diffusion_model.",
            separator=".",
            factors=("lora_A.weight", "lora_B.weight"),
            stores_alpha=False,
            remarks={"norm_out.linear": _NOT_SWAPPED},
        ),
        Format(
            name="kohya",
            readers="musubi-tuner, ComfyUI, diffusers",
            modules=adapter_names.bfl,
            prefix="lora_unet_",
            separator="_",
            factors=("lora_down.weight", "lora_up.weight"),
            stores_alpha=True,
            kohya_header=True,
            refused={
                "time_guidance_embed.guidance_embedder.*": _DROPPED,
                "*_modulation*.linear": _DROPPED,
                "norm_out.linear": _DROPPED,
            },
        ),
    )
}
"""The formats by the name that `relay export --format` takes."""


def tensors(
    form: Format, factors: Mapping[str, Factors], spec: TransformerSpec, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """The tensors of a file in this format: A and B in `dtype`, folded in float32 before; alpha float32.

    `factors` are by diffusers' module paths. InputError names every module that the format cannot carry.
    """
    _refuse(form, factors)
    values: dict[str, mx.array] = {}
    for name, module in form.modules(spec).items():
        if not any(part in factors for part in module.parts):
            continue
        whole = _laid_out(module, factors)
        key, (a_name, b_name) = form.key(name), form.factors
        values[f"{key}.{a_name}"] = whole.a.astype(dtype)
        values[f"{key}.{b_name}"] = (whole.b if form.stores_alpha else whole.b * whole.scale).astype(dtype)
        if form.stores_alpha:
            values[f"{key}.alpha"] = mx.array(whole.scale * whole.a.shape[0], mx.float32)
    return values


def remarks(form: Format, factors: Mapping[str, Factors]) -> list[str]:
    """A sentence for each module that a program other than the format's own would not read rightly."""
    return [f"{path}: {sentence}" for path in factors if (sentence := _matching(form.remarks, path))]


def _refuse(form: Format, factors: Mapping[str, Factors]) -> None:
    faults = [f"{path}: {sentence}" for path in factors if (sentence := _matching(form.refused, path))]
    if faults:
        raise InputError(listing(f"--format {form.name} cannot carry these modules:", faults))


def _matching(table: Mapping[str, str], path: str) -> str | None:
    return next((sentence for pattern, sentence in table.items() if fnmatchcase(path, pattern)), None)


def _laid_out(module: Module, factors: Mapping[str, Factors]) -> Factors:
    """The update of one linear of a layout."""
    parts = [factors.get(part) for part in module.parts]
    whole = parts[0] if len(parts) == 1 and parts[0] is not None else _fused(parts, module.shape[0] // len(parts))
    if not module.swapped:
        return whole
    first, second = mx.split(whole.b, 2, axis=0)
    return Factors(whole.a, mx.concatenate([second, first]), whole.scale)


def _fused(parts: Sequence[Factors | None], rows: int) -> Factors:
    """The update of a matrix that stacks `rows` rows of each part; a part without an update gets zeros."""
    there = [part for part in parts if part is not None]
    scale = there[0].scale
    if any(part.scale != scale for part in there):  # one alpha cannot say it: fold each into its B
        there = [Factors(part.a, part.b * part.scale, 1.0) for part in there]
        scale = 1.0
    if all(_is_same(part.a, there[0].a) for part in there[1:]):
        a, width = there[0].a, there[0].a.shape[0]
        shift = [0] * len(there)
    else:
        a = mx.concatenate([part.a for part in there])
        width = a.shape[0]
        shift = [sum(part.a.shape[0] for part in there[:place]) for place in range(len(there))]
    places = iter(zip(there, shift, strict=True))
    stretches = [mx.zeros((rows, width)) if part is None else _placed(*next(places), width) for part in parts]
    return Factors(a, mx.concatenate(stretches), scale)


def _placed(part: Factors, shift: int, width: int) -> mx.array:
    """The columns of a part's B among all columns."""
    return mx.pad(part.b, [(0, 0), (shift, width - shift - part.b.shape[1])])


def _is_same(one: mx.array, other: mx.array) -> bool:
    return one.shape == other.shape and bool(mx.array_equal(one, other))
