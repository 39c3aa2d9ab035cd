"""LoRA files of other programs, read under our names: whatever stands in front of, between and behind the modules.

    transformer.X.lora_A.weight   X.lora_A.default.weight   base_model.model.X.lora_B.weight      diffusers, peft
    lora_unet_Y.lora_down.weight  lora_unet_Y.alpha         lora_transformer_X.lora_up.weight     kohya, OneTrainer
    diffusion_model.Y.lora_A.weight                         diffusion_model.X.lora_A.weight       ComfyUI, ai-toolkit

X is a module's name in diffusers, Y its name in BFL's files (`stages/names.py`), where q, k and v are one matrix. The
strength is alpha / rank: from a tensor `….alpha`, else from the metadata that diffusers writes, else 1.
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
from flux2_relay.stages.train import adapter_names, adapter_sizes
from flux2_relay.stages.train.adapter_names import Module
from flux2_relay.stages.weights import listing

_KEY = re.compile(
    r"(.+?)(?:\.lora_([AB])(?:\.\w+)?\.weight"  # with peft's name of the adapter, or without
    r"|(?:\.lora_linear_layer|[._]lora)[._](down|up)\.weight"  # with two spellings of older diffusers
    r"|\.(alpha))"
)
_ROLES = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's low-rank update, scale * B A: A [r, in] and B [out, r] float32."""

    a: mx.array
    b: mx.array
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFile:
    """What a LoRA file holds."""

    factors: dict[str, Factors]
    """Updates by diffusers' module paths."""
    spec: TransformerSpec
    """The transformer that it was read for."""
    metadata: dict[str, str]
    dtype: mx.Dtype
    """The type that all factors stand in; float32 where they differ."""


@dataclass(slots=True)
class _Found:
    """What the file has of one module: role -> (name in the file, value)."""

    module: Module
    tensors: dict[str, tuple[str, mx.array]] = field(default_factory=dict)


def read(path: Path | str, spec: TransformerSpec) -> dict[str, Factors]:
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
        raise InputError(f"{path}: no such file; expected a LoRA in safetensors")
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
        faults += _faults(name, one)
    if not found and not faults:
        faults.append("it holds no tensor at all")
    if faults:
        raise InputError(listing(f"{path} is no LoRA for {model}:", faults))
    told = _Told.read(metadata, path)
    factors = dict(pair for one in found.values() for pair in _factors(one, told))
    return AdapterFile(factors=factors, spec=spec, metadata=metadata, dtype=_dtype(found))


def _placed(values: Mapping[str, mx.array]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Key -> (plain module name, role), and a fault for each key that is no factor."""
    placed, faults = {}, []
    for key in values:
        if match := _KEY.fullmatch(key):
            placed[key] = adapter_names.plain(match[1]), _ROLES[match[2] or match[3] or match[4]]
        else:
            faults.append(f"{key} is no factor of a LoRA (expected lora_A, lora_B, lora_down, lora_up or alpha)")
    return placed, faults


def _sides(placed: Mapping[str, tuple[str, str]], values: Mapping[str, mx.array]) -> Iterator[adapter_sizes.Side]:
    for key, (name, role) in placed.items():
        if role in ("A", "B") and values[key].ndim == 2:
            yield name, role, values[key].shape[role == "A"]


def _by_module(
    values: Mapping[str, mx.array],
    placed: Mapping[str, tuple[str, str]],
    known: adapter_names.Modules,
    faults: list[str],
) -> dict[str, _Found]:
    """The tensors by module and role; what this model has no place for goes to `faults`."""
    found: dict[str, _Found] = {}
    for key, (name, role) in placed.items():
        if name not in known:
            faults.append(f"{key}: this model has no linear of that name")
            continue
        one = found.setdefault(name, _Found(known[name]))
        if role in one.tensors:
            faults.append(f"{key} stands there a second time, as {one.tensors[role][0]}")
        one.tensors[role] = key, values[key]
    faults += _doubled(found)
    return found


def _doubled(found: Mapping[str, _Found]) -> Iterator[str]:
    """A fault for each module that two namings of one file have: which of them would count?"""
    first: dict[str, str] = {}
    for name, one in found.items():
        for part in one.module.parts:
            if part in first:
                yield f"{part} stands there twice, as {first[part]} and as {name}"
            first.setdefault(part, name)


def _dtype(found: Mapping[str, _Found]) -> mx.Dtype:
    types = {one.tensors[role][1].dtype for one in found.values() for role in ("A", "B")}
    return types.pop() if len(types) == 1 else mx.float32


def _faults(name: str, found: _Found) -> list[str]:
    """What is wrong with the tensors of one module."""
    missing = [role for role in ("A", "B") if role not in found.tensors]
    if missing:
        names_there = ", ".join(key for key, _ in found.tensors.values())
        return [f"{names_there}: {' and '.join(f'factor {role}' for role in missing)} of {name} is missing"]
    faults = [
        f"{key} has type {v.dtype}; expected floats" for key, v in found.tensors.values() if v.dtype not in _FLOATS
    ]
    (a_key, a), (b_key, b) = found.tensors["A"], found.tensors["B"]
    rows, columns = found.module.shape
    rank = a.shape[0] if a.ndim == 2 else 0
    if a.ndim != 2 or a.shape[1] != columns or not rank:
        faults.append(f"{a_key}: expected rank x {columns}, found {_shape(a)}")
    if b.ndim != 2 or b.shape[0] != rows or (rank and b.shape[1] != rank):
        faults.append(f"{b_key}: expected {rows} x {rank or 'rank'}, found {_shape(b)}")
    if "alpha" in found.tensors and found.tensors["alpha"][1].size != 1:
        key, alpha = found.tensors["alpha"]
        faults.append(f"{key}: expected one number, found {_shape(alpha)}")
    return faults


def _shape(value: mx.array) -> str:
    return " x ".join(map(str, value.shape)) or "a single number"


def _factors(found: _Found, told: "_Told") -> Iterator[tuple[str, Factors]]:
    """The updates of the linears that a module stands for."""
    a, b = (found.tensors[role][1].astype(mx.float32) for role in ("A", "B"))
    rank, module = a.shape[0], found.module
    alpha = float(found.tensors["alpha"][1].reshape(())) if "alpha" in found.tensors else None
    scale = told.scale(module.parts[0], rank) if alpha is None else alpha / rank
    if module.swapped:
        first, second = mx.split(b, 2, axis=0)
        b = mx.concatenate([second, first], axis=0)
    if len(module.parts) == 1:
        yield module.parts[0], Factors(a, b, scale)
        return
    parts = mx.split(b, len(module.parts), axis=0)
    columns = [[n for n, used in enumerate(mx.any(part != 0, axis=0).tolist()) if used] for part in parts]  # type: ignore[arg-type]
    if not any(columns) and rank % len(parts) == 0:  # untrained: the rows of A belong to the parts in their order
        third = rank // len(parts)
        columns = [list(range(place * third, (place + 1) * third)) for place in range(len(parts))]
    for path, part, used in zip(module.parts, parts, columns, strict=True):
        if used:  # in a block-diagonal B each part uses columns of its own; the others' rows of A mean nothing to it
            yield path, Factors(a[mx.array(used)], part[:, mx.array(used)], scale)


@dataclass(frozen=True, slots=True)
class _Told:
    """What diffusers' metadata say of strengths: peft's `LoraConfig`."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rooted: bool = False  # rank-stabilised: alpha / sqrt(rank)

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: Path) -> "_Told":
        """From a file's metadata; nothing where there is none."""
        if "lora_adapter_metadata" not in metadata:
            return cls()
        try:
            fields = json.loads(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): value for key, value in fields.items()}
            alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
            return cls(
                None if alpha is None else float(alpha),
                {str(pattern): float(value) for pattern, value in patterns.items()},
                bool(config.get("use_rslora")),
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
