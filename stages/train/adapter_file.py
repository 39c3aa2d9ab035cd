"""LoRA files of other programs, read under our names: whatever stands in front of, between and behind the modules.

    transformer.X.lora_A.weight   X.lora_A.default.weight   base_model.model.X.lora_B.weight      diffusers, peft
    lora_unet_Y.lora_down.weight  lora_unet_Y.alpha         lora_transformer_X.lora_up.weight     kohya, OneTrainer
    diffusion_model.Y.lora_A.weight                         diffusion_model.X.lora_A.weight       ComfyUI, ai-toolkit

X is a module's name in diffusers, Y its name in BFL's files (`stages/names.py`), where q, k and v are one matrix. The
strength is alpha / rank: from a tensor `….alpha`, else from the metadata that diffusers writes, else 1. With
`….dora_scale` or `….lora_magnitude_vector` it is DoRA, with `….lokr_w1` and `….lokr_w2` LoKr (`adapter_parts.py`).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.files import read_tensors
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_names, adapter_parts, adapter_sizes
from flux2_relay.stages.train.adapter_names import Module
from flux2_relay.stages.train.adapter_parts import Found
from flux2_relay.stages.train.dora_update import OVER_BASE
from flux2_relay.stages.train.updates import Update
from flux2_relay.stages.weights import listing

_KEY = re.compile(
    r"(.+?)(?:\.lora_([AB])(?:\.\w+)?\.weight"  # with peft's name of the adapter, or without
    r"|(?:\.lora_linear_layer|[._]lora)[._](down|up)\.weight"  # with two spellings of older diffusers
    r"|\.(alpha|dora_scale)"
    r"|\.(lora_magnitude_vector)(?:\.\w+)?"  # with a name and `.weight` of peft's, or without
    r"|\.lokr_(w[12](?:_[ab])?))"
)
_FACTORS = ("A", "B", "w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")
_ROLES = {"down": "A", "up": "B", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude"}
"""What a tensor is -> its role in `Found`, where that is called otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """What a LoRA file holds."""

    factors: dict[str, Update]
    """Updates by diffusers' module paths."""
    spec: TransformerSpec
    """The transformer that it was read for."""
    metadata: dict[str, str]
    dtype: mx.Dtype
    """The type that all factors stand in; float32 where they differ."""


def read(path: Path | str, spec: TransformerSpec) -> dict[str, Update]:
    """The updates in a LoRA file by diffusers' module paths, those outside the blocks included.

    InputError names every tensor that belongs to no module of this model, has no partner, or has a shape that does
    not fit.
    """
    return read_file(path, spec).factors


def read_file(path: Path | str, spec: TransformerSpec | None = None, told_by: Path | None = None) -> AdapterFile:
    """A LoRA file whole; without `spec`, the sizes of its model are told by its own shapes. InputError as for `read`.

    `told_by` is another file whose metadata hold for this one.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file or run folder; expected a run, or a LoRA in safetensors")
    values, metadata = read_tensors(path)
    if told_by is not None:
        metadata = read_tensors(told_by)[1]
    placed, faults = _placed(values)
    model = "this model" if spec else "the model that its shapes tell (name it, if it is another)"
    spec = spec or adapter_sizes.spec_of(_sides(placed, values))
    if spec is None:
        faults.append("no tensor of it has the name of a linear of FLUX.2" if values else "it holds no tensor at all")
        raise InputError(listing(f"{path} is no LoRA for FLUX.2:", faults))
    found = _by_module(values, placed, adapter_names.known(spec), faults)
    for name, one in found.items():
        faults += adapter_parts.faults(name, one)
    if not found and not faults:
        faults.append("it holds no tensor at all")
    if faults:
        raise InputError(listing(f"{path} is no LoRA for {model}:", faults))
    told = _Told.read(metadata, path)
    factors = dict(pair for one in found.values() for pair in adapter_parts.updates(one, told))
    return AdapterFile(factors=factors, spec=spec, metadata=metadata, dtype=_dtype(found))


def _placed(values: Mapping[str, mx.array]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Key -> (plain module name, role), and a fault for each key that is no factor."""
    placed, faults = {}, []
    for key in values:
        if match := _KEY.fullmatch(key):
            what = next(part for part in match.groups()[1:] if part)
            placed[key] = adapter_names.plain(match[1]), _ROLES.get(what, what)
        else:
            faults.append(f"{key} is no factor of a LoRA (expected lora_A, lora_B, lora_down, lora_up or alpha)")
    return placed, faults


def _sides(placed: Mapping[str, tuple[str, str]], values: Mapping[str, mx.array]) -> Iterator[adapter_sizes.Side]:
    for name, one in _grouped(placed, values).items():
        for role, size in one.sides():
            yield name, role, size


def _grouped(placed: Mapping[str, tuple[str, str]], values: Mapping[str, mx.array]) -> dict[str, Found]:
    """By plain names of modules, of which nothing else is known yet."""
    grouped: dict[str, Found] = {}
    for key, (name, role) in placed.items():
        grouped.setdefault(name, Found(Module((), (0, 0)))).tensors[role] = key, values[key]
    return grouped


def _by_module(
    values: Mapping[str, mx.array],
    placed: Mapping[str, tuple[str, str]],
    known: adapter_names.Modules,
    faults: list[str],
) -> dict[str, Found]:
    """The tensors by module and role; what this model has no place for goes to `faults`."""
    found: dict[str, Found] = {}
    for key, (name, role) in placed.items():
        if name not in known:
            faults.append(f"{key}: this model has no linear of that name")
            continue
        one = found.setdefault(name, Found(known[name]))
        if role in one.tensors:
            faults.append(f"{key} stands there a second time, as {one.tensors[role][0]}")
        one.tensors[role] = key, values[key]
    faults += _doubled(found)
    return found


def _doubled(found: Mapping[str, Found]) -> Iterator[str]:
    """A fault for each module that two namings of one file have: which of them would count?"""
    first: dict[str, str] = {}
    for name, one in found.items():
        for part in one.module.parts:
            if part in first:
                yield f"{part} stands there twice, as {first[part]} and as {name}"
            first.setdefault(part, name)


def _dtype(found: Mapping[str, Found]) -> mx.Dtype:
    factors = (tensor for one in found.values() for role, tensor in one.tensors.items() if role in _FACTORS)
    types = {value.dtype for _, value in factors}
    return types.pop() if len(types) == 1 else mx.float32


@dataclass(frozen=True, slots=True)
class _Told:
    """What diffusers' metadata say of strengths: peft's `LoraConfig`."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rooted: bool = False  # rank-stabilised: alpha / sqrt(rank)
    over_base: bool = False

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: Path) -> "_Told":
        """From a file's metadata; nothing where there is none."""
        over_base = OVER_BASE.items() <= metadata.items()
        if "lora_adapter_metadata" not in metadata:
            return cls(over_base=over_base)
        try:
            fields = json.loads(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): value for key, value in fields.items()}
            alpha, patterns = config.get("lora_alpha", config.get("alpha")), config.get("alpha_pattern") or {}
            return cls(
                None if alpha is None else float(alpha),
                {str(pattern): float(value) for pattern, value in patterns.items()},
                bool(config.get("use_rslora")),
                over_base,
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its metadata 'lora_adapter_metadata' cannot be read ({error})") from None

    def scale(self, module: str, rank: int) -> float:
        """The strength of an update of `rank` on a module; patterns match at the end of its path, as in peft."""
        matching = (v for pattern, v in self.patterns.items() if module == pattern or module.endswith("." + pattern))
        alpha = next(matching, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rooted else rank)
