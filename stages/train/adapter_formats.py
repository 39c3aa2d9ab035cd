"""How other programs want an adapter: a table of formats, and the one algebra that serves them all.

Where a layout holds q, k and v as one matrix, A is theirs one below the other and B block-diagonal: rank 3r. Readers
divide alpha by the fused rank, so alpha is the scale times that rank: 3 alpha. Nothing else is exact, but for three
that share one A already (ai-toolkit trains so), which stay one pair of rank r.

DoRA goes the same way, its lengths one below the other. A Kronecker product over q, k and v is none over each, and the
other way round: LoKr has diffusers' modules under LyCORIS's names in every format that carries it.

`tests/oracle/test_adapter_formats.py` loads each format into diffusers; what others read is in `docs/adapters.md`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_names
from flux2_relay.stages.train.adapter_names import Module, Modules
from flux2_relay.stages.train.dora_update import OVER_BASE, DoraUpdate
from flux2_relay.stages.train.lokr import Factor, sides
from flux2_relay.stages.train.lokr_update import LokrUpdate
from flux2_relay.stages.train.transformer import block_linears
from flux2_relay.stages.train.updates import Factors, Updates
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
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Kind of update -> why the format does not carry it."""
    over_base: bool = False
    """Whether lengths of DoRA are written as those over the base's rows, which takes the base to tell."""

    def key(self, module: str) -> str:
        """A module's name in the file."""
        return self.prefix + module.replace(".", self.separator)


_MISSED = "ComfyUI leaves this module out under diffusers' names; --format comfyui is read whole there"
_NOT_SWAPPED = "diffusers reads this module wrongly under BFL's names; --format diffusers is read rightly there"
_DROPPED = "diffusers drops this module under kohya's names; use --format comfyui"
_LENGTHS_LOST = "drops the lengths of DoRA without an error, and draws with half an adapter"
_LYCORIS_OUTER = "LoKr of modules outside the blocks is read by neither diffusers nor ComfyUI; relay merge takes it"

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
            kinds={"dora": f"diffusers {_LENGTHS_LOST}; use --format comfyui or relay merge"},
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
            over_base=True,
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
            kinds={
                "dora": f"diffusers {_LENGTHS_LOST}, musubi-tuner knows none; use --format comfyui or relay merge",
                "lokr": "under kohya's names diffusers reads LoRA alone; use --format diffusers",
            },
        ),
    )
}
"""The formats by the name that `relay export --format` takes."""


def for_runs(kinds: Collection[str]) -> Format:
    """The format that a run leaves its adapter in: the first that carries all its kinds."""
    return next(form for form in FORMATS.values() if not any(kind in form.kinds for kind in kinds))


def tensors(form: Format, factors: Updates, spec: TransformerSpec, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The tensors of a file in this format: factors in `dtype`, folded in float32 before; alpha and lengths float32.

    `factors` are by diffusers' module paths. InputError names every module that the format cannot carry.
    """
    refuse(form, factors, spec)
    values: dict[str, mx.array] = {}
    for path, update in factors.items():
        if isinstance(update, LokrUpdate):
            values |= _lycoris(path, update.plain(), dtype)
    low = {path: update for path, update in factors.items() if isinstance(update, Factors | DoraUpdate)}
    for name, module in form.modules(spec).items():
        if any(part in low for part in module.parts):
            values |= _low_rank(form, form.key(name), module, low, dtype)
    return values


def header(factors: Updates) -> dict[str, str]:
    """What a header must say for the tensors to be read rightly."""
    over_base = any(isinstance(update, DoraUpdate) and update.over_base for update in factors.values())
    return dict(OVER_BASE) if over_base else {}


def _low_rank(
    form: Format, key: str, module: Module, low: Mapping[str, Factors | DoraUpdate], dtype: mx.Dtype
) -> dict[str, mx.array]:
    whole, (a_name, b_name) = _laid_out(module, {path: _factors(update) for path, update in low.items()}), form.factors
    values = {
        f"{key}.{a_name}": whole.a.astype(dtype),
        f"{key}.{b_name}": (whole.b if form.stores_alpha else whole.b * whole.scale).astype(dtype),
    }
    if form.stores_alpha:
        values[f"{key}.alpha"] = mx.array(whole.scale * whole.a.shape[0], mx.float32)
    lengths = [update.magnitude for part in module.parts if isinstance(update := low.get(part), DoraUpdate)]
    if lengths:
        values[f"{key}.dora_scale"] = _swapped(module, mx.concatenate(lengths))[:, None]
    return values


def _lycoris(path: str, update: LokrUpdate, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Alpha stands there always, as LyCORIS asks for it; it counts where W2 has a rank."""
    names = ("lokr_w2",) if len(update.w2) == 1 else ("lokr_w2_a", "lokr_w2_b")
    named = {"lokr_w1": update.w1, **dict(zip(names, update.w2, strict=True))}
    key = "lycoris_" + path.replace(".", "_")
    values = {f"{key}.{name}": value.astype(dtype) for name, value in named.items()}
    return values | {f"{key}.alpha": mx.array(update.scale * (update.rank or 1), mx.float32)}


def remarks(form: Format, factors: Updates) -> list[str]:
    """A sentence for each module that a program other than the format's own would not read rightly."""
    return [f"{path}: {sentence}" for path in factors if (sentence := _matching(form.remarks, path))]


def refuse(form: Format, factors: Updates, spec: TransformerSpec) -> None:
    """InputError names every module that the format cannot carry."""
    faults = [f"{path}: {sentence}" for path in factors if (sentence := _matching(form.refused, path))]
    faults += [f"{path}: {form.kinds[update.kind]}" for path, update in factors.items() if update.kind in form.kinds]
    faults += _refused_lokr(factors, spec)
    faults += _refused_dora(form, factors, spec)
    if faults:
        raise InputError(listing(f"--format {form.name} cannot carry these modules:", faults))


def _refused_lokr(factors: Updates, spec: TransformerSpec) -> Iterator[str]:
    """Diffusers takes LoKr of blocks alone, nothing beside it, and one factor for all, which it tells by the shapes."""
    found = {path: update.plain() for path, update in factors.items() if isinstance(update, LokrUpdate)}
    inside = block_linears(spec)
    yield from (f"{path}: {_LYCORIS_OUTER}" for path in found if path not in inside)
    if found:
        yield from (f"{path}: no other kind can stand in a file with LoKr" for path in factors if path not in found)
    if found and not _factor_of(found.values()):
        yield f"{next(iter(found))} and others: the sides of their factors follow no one rule, as readers expect"


def _factor_of(found: Collection[LokrUpdate]) -> bool:
    """Whether one factor makes all sides what they are."""
    pairs = [(a, b) for one in found for a, b in zip(one.w1.shape, one.inner.shape, strict=True)]
    tried: list[Factor] = [*sorted({update.w1.shape[0] for update in found}), "auto"]
    return any(all(sides(a * b, factor) == (a, b) for a, b in pairs) for factor in tried)


def _refused_dora(form: Format, factors: Updates, spec: TransformerSpec) -> Iterator[str]:
    """Of a matrix that stacks parts, either each has lengths or none."""
    for module in form.modules(spec).values():
        kinds = [isinstance(factors.get(part), DoraUpdate) for part in module.parts]
        if any(kinds) and not all(kinds):
            there = next(part for part, is_dora in zip(module.parts, kinds, strict=True) if is_dora)
            yield f"{there}: is one matrix with {len(kinds) - 1} others there, and not all of them have DoRA"


def _factors(update: Factors | DoraUpdate) -> Factors:
    return update.low if isinstance(update, DoraUpdate) else update


def _matching(table: Mapping[str, str], path: str) -> str | None:
    return next((sentence for pattern, sentence in table.items() if fnmatchcase(path, pattern)), None)


def _laid_out(module: Module, factors: Mapping[str, Factors]) -> Factors:
    """The update of one linear of a layout."""
    parts = [factors.get(part) for part in module.parts]
    whole = parts[0] if len(parts) == 1 and parts[0] is not None else _fused(parts, module.shape[0] // len(parts))
    return Factors(whole.a, _swapped(module, whole.b), whole.scale)


def _swapped(module: Module, rows: mx.array) -> mx.array:
    """Rows in the order that the layout has them in."""
    if not module.swapped:
        return rows
    first, second = mx.split(rows, 2, axis=0)
    return mx.concatenate([second, first])


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
