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
from flux2_relay.stages import names
from flux2_relay.stages.files import read_tensors
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.transformer import block_linears, outer_shapes
from flux2_relay.stages.weights import listing

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_")
_KEY = re.compile(r"(.+?)\.(?:lora_([AB])(?:\.default)?\.weight|lora[_.](down|up)\.weight|(alpha))")
_ROLES = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's low-rank update, scale * B A: A [r, in] and B [out, r] float32."""

    a: mx.array
    b: mx.array
    scale: float


@dataclass(frozen=True, slots=True)
class _Module:
    """A linear as a file may name it: one of ours, or three whose rows it stacks."""

    parts: tuple[str, ...]
    shape: tuple[int, int]
    swapped: bool = False  # the two halves of its rows stand in the other order


@dataclass(slots=True)
class _Found:
    """What the file has of one module: role -> (name in the file, value)."""

    module: _Module
    tensors: dict[str, tuple[str, mx.array]] = field(default_factory=dict)


def read(path: Path | str, spec: TransformerSpec) -> dict[str, Factors]:
    """The updates in a LoRA file by diffusers' module paths, those outside the blocks included.

    InputError names every tensor that belongs to no module of this model, has no partner, or has a shape that does
    not fit.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a LoRA in safetensors")
    values, metadata = read_tensors(path)
    faults: list[str] = []
    found = _sorted_out(values, _modules(spec), faults)
    for name, one in found.items():
        faults += _faults(name, one)
    if not found and not faults:
        faults.append("it holds no tensor at all")
    if faults:
        raise InputError(listing(f"{path} is no LoRA for this model:", faults))
    told = _Told.read(metadata, path)
    return dict(pair for one in found.values() for pair in _factors(one, told))


def _sorted_out(values: Mapping[str, mx.array], known: Mapping[str, _Module], faults: list[str]) -> dict[str, _Found]:
    """The tensors by module and role; what cannot be placed goes to `faults`."""
    found: dict[str, _Found] = {}
    for key, value in values.items():
        match = _KEY.fullmatch(key)
        if match is None:
            faults.append(f"{key} is no factor of a LoRA (expected lora_A, lora_B, lora_down, lora_up or alpha)")
            continue
        name = _plain(match[1])
        if name not in known:
            faults.append(f"{key}: this model has no linear of that name")
            continue
        role = _ROLES[match[2] or match[3] or match[4]]
        one = found.setdefault(name, _Found(known[name]))
        if role in one.tensors:
            faults.append(f"{key} stands there a second time, as {one.tensors[role][0]}")
        one.tensors[role] = key, value
    return found


def _plain(name: str) -> str:
    """A module's name without what programs put in front, its dots as underscores: the one form that all can take."""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name.replace(".", "_")


def _modules(spec: TransformerSpec) -> dict[str, _Module]:
    """Plain name -> module, for every name that a linear of this model has anywhere."""
    shapes: dict[str, tuple[int, int]] = block_linears(spec) | {n: (s[0], s[1]) for n, s in outer_shapes(spec).items()}
    known = {name: _Module((name,), shape) for name, shape in shapes.items()}
    known |= {bfl: known[ours] for bfl, ours in names.OUTER.items() if ours in known}
    for bfl, ours in names.SWAPPED.items():
        known[bfl] = _Module((ours,), shapes[ours], swapped=True)
    for index in range(spec.double_blocks):
        block = f"transformer_blocks.{index}"
        known[f"{block}.attn.to_out"] = known[f"{block}.attn.to_out.0"]  # as mflux writes it
        pairs = {bfl: f"{block}.{ours}" for bfl, ours in names.DOUBLE.items()}
        known |= {f"double_blocks.{index}.{bfl}": known[ours] for bfl, ours in pairs.items() if ours in known}
        for bfl, parts in names.FUSED.items():
            rows, columns = shapes[f"{block}.{parts[0]}"]
            fused = _Module(tuple(f"{block}.{part}" for part in parts), (3 * rows, columns))
            known[f"double_blocks.{index}.{bfl}"] = fused
    for index in range(spec.single_blocks):
        pairs = {bfl: f"single_transformer_blocks.{index}.{ours}" for bfl, ours in names.SINGLE.items()}
        known |= {f"single_blocks.{index}.{bfl}": known[ours] for bfl, ours in pairs.items() if ours in known}
    for number in (1, 2):  # mflux again
        known[f"time_guidance_embed.linear_{number}"] = known[f"time_guidance_embed.timestep_embedder.linear_{number}"]
    return {name.replace(".", "_"): module for name, module in known.items()}


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
    for path, rows in zip(module.parts, mx.split(b, len(module.parts), axis=0), strict=True):
        used = [n for n, is_used in enumerate(mx.any(rows != 0, axis=0).tolist()) if is_used]  # type: ignore[arg-type]
        if (
            used
        ):  # in a block-diagonal B each part uses columns of its own, and the others' rows of A mean nothing to it
            yield path, Factors(a[mx.array(used)], rows[:, mx.array(used)], scale)


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
