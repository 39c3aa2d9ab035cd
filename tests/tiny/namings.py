"""LoRA files in every naming that programs write, made without the code under test, and what each reader does there.

X is a module's name in diffusers, Y in BFL's files; X_ and Y_ are the same with underscores for the dots.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from flux2_relay.stages import names
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.transformer import block_linears, outer_shapes

Pairs = dict[str, tuple[mx.array, mx.array]]
"""Module -> A [r, in] and B [out, r]."""
Values = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class Naming:
    """One row of the table in docs/adapters.md: a way to write an adapter, and who reads it."""

    module: str
    """What stands for a module: X, Y, X_ or Y_ behind what the program puts in front."""
    factors: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    alpha: Literal["folded", "tensor", "metadata"] = "folded"
    """Where the strength stands; folded is in B."""
    diffusers: str
    """What diffusers 0.42 does, which tests/oracle finds out anew: ok, refuses, loads nothing, wrong."""
    comfyui: str
    """What ComfyUI's own mapping did when it was tried; not found out anew."""
    mflux: str
    """The same of mflux."""
    written: str = ""
    """The format of `relay export` that writes it."""


_DOWN, _DOT = ("lora_down.weight", "lora_up.weight"), ("lora.down.weight", "lora.up.weight")
_DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
_OK, _NOTHING, _MISSES, _FUSED = "ok", "loads nothing", "misses all", "ok unless 3 divides the fused rank"

NAMINGS = (
    Naming(module="transformer.X", diffusers=_OK, comfyui=_OK, mflux=_OK, written="diffusers"),
    Naming(module="transformer.X", alpha="metadata", diffusers=_OK, comfyui="wrong strength", mflux="wrong strength"),
    Naming(module="transformer.X", alpha="tensor", diffusers="refuses", comfyui=_OK, mflux=_OK),
    Naming(module="X", diffusers=_NOTHING, comfyui=_OK, mflux=_OK),
    Naming(module="diffusion_model.X", diffusers=_OK, comfyui=_MISSES, mflux=_OK),
    Naming(module="base_model.model.X", diffusers=_OK, comfyui=_MISSES, mflux=_MISSES),
    Naming(module="transformer.X", factors=_DEFAULT, diffusers="wrong", comfyui=_OK, mflux=_OK),
    Naming(module="transformer.X", factors=_DOT, diffusers=_OK, comfyui=_OK, mflux=_MISSES),
    Naming(module="transformer.X", factors=_DOWN, diffusers=_NOTHING, comfyui=_OK, mflux=_OK),
    Naming(module="lora_transformer_X_", factors=_DOWN, diffusers=_NOTHING, comfyui=_OK, mflux=_MISSES),
    Naming(module="diffusion_model.Y", diffusers=_OK, comfyui=_OK, mflux=_FUSED, written="comfyui"),
    Naming(module="diffusion_model.Y", alpha="tensor", diffusers="refuses", comfyui=_OK, mflux=_FUSED),
    Naming(module="diffusion_model.Y", factors=_DOWN, diffusers=_NOTHING, comfyui=_OK, mflux=_FUSED),
    Naming(module="base_model.model.Y", diffusers=_OK, comfyui=_MISSES, mflux=_FUSED),
    Naming(module="Y", diffusers=_NOTHING, comfyui=_MISSES, mflux=_MISSES),
    Naming(
        module="lora_unet_Y_",
        factors=_DOWN,
        alpha="tensor",
        diffusers=_OK,
        comfyui=_OK,
        mflux=_FUSED,
        written="kohya",
    ),
    Naming(module="lora_unet_Y_", factors=_DOWN, diffusers=_OK, comfyui=_OK, mflux=_FUSED),
    Naming(module="lora_unet_X_", factors=_DOWN, diffusers=_NOTHING, comfyui=_MISSES, mflux=_OK),
)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """What becomes of a module outside the blocks in each format: in diffusers, and in ComfyUI when it was tried."""

    module: str
    diffusers: Mapping[str, str]
    comfyui: Mapping[str, str]


def _outer(module: str, diffusers: tuple[str, str, str], comfyui: tuple[str, str, str]) -> Outer:
    formats = ("diffusers", "comfyui", "kohya")
    return Outer(
        module=module,
        diffusers=dict(zip(formats, diffusers, strict=True)),
        comfyui=dict(zip(formats, comfyui, strict=True)),
    )


_TIME, _ALL = "time_guidance_embed.", ("ok", "ok", "ok")
OUTER = (
    *(_outer(module, _ALL, _ALL) for module in ("x_embedder", "context_embedder", "proj_out")),
    *(_outer(f"{_TIME}timestep_embedder.linear_{n}", _ALL, ("misses", "ok", "ok")) for n in (1, 2)),
    *(
        _outer(module, ("ok", "ok", "misses"), ("misses", "ok", "ok"))
        for module in (
            f"{_TIME}guidance_embedder.linear_1",
            f"{_TIME}guidance_embedder.linear_2",
            "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.linear",
            "single_stream_modulation.linear",
        )
    ),
    _outer("norm_out.linear", ("ok", "wrong", "misses"), ("ok", "ok", "ok")),
)
"""Every linear outside the blocks."""


def random(shape: tuple[int, ...], *name: object) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(zlib.crc32(repr(name).encode())))


def shapes(spec: TransformerSpec) -> dict[str, tuple[int, int]]:
    """Every linear of a transformer -> (out, in)."""
    return block_linears(spec) | {name: (s[0], s[1]) for name, s in outer_shapes(spec).items()}


def pairs(spec: TransformerSpec, rank: int = 2, outer: bool = True) -> Pairs:
    """A and B of every linear, in diffusers' names; their product is about one tenth of a weight."""
    chosen = shapes(spec) if outer else block_linears(spec)
    return {
        path: (random((rank, columns), path, 0), random((rows, rank), path, 1))
        for path, (rows, columns) in chosen.items()
    }


def bfl(of: Pairs) -> Pairs:
    """The same updates in BFL's names: q, k and v block-diagonal in one matrix, norm_out with its halves swapped."""
    theirs = {path: name for name, path in names.OUTER.items()}
    blocks = {
        "transformer_blocks": ("double_blocks", names.DOUBLE),
        "single_transformer_blocks": ("single_blocks", names.SINGLE),
    }
    found: Pairs = {}
    for path, (a, b) in of.items():
        kind, _, rest = path.partition(".")
        number, _, inner = rest.partition(".")
        if path in theirs:
            found[theirs[path]] = a, b
        elif path in names.SWAPPED.values():
            half = b.shape[0] // 2
            found["final_layer.adaLN_modulation.1"] = a, mx.concatenate([b[half:], b[:half]])
        elif kind in blocks and (name := _of(blocks[kind][1], inner)):
            found[f"{blocks[kind][0]}.{number}.{name}"] = a, b
    return found | _fused(of)


def _of(table: Mapping[str, str], path: str) -> str | None:
    return next((name for name, ours in table.items() if ours == path), None)


def _fused(of: Pairs) -> Pairs:
    found: Pairs = {}
    for number in {path.split(".")[1] for path in of if path.startswith("transformer_blocks.")}:
        for name, parts in names.FUSED.items():
            three = [of.get(f"transformer_blocks.{number}.{part}") for part in parts]
            there = [pair for pair in three if pair is not None]
            if there:
                found[f"double_blocks.{number}.{name}"] = _block_diagonal(three, there)
    return found


def _block_diagonal(three: list, there: list) -> tuple[mx.array, mx.array]:
    """One A below the other; the B of each in its own rows and columns."""
    rows = there[0][1].shape[0]
    b, column = mx.zeros((3 * rows, sum(a.shape[0] for a, _ in there))), 0
    for place, pair in enumerate(three):
        if pair is not None:
            rank = pair[0].shape[0]
            b[place * rows : (place + 1) * rows, column : column + rank] = pair[1]
            column += rank
    return mx.concatenate([a for a, _ in there]), b


def file_of(naming: Naming, of: Pairs, scale: float) -> tuple[Values, dict[str, str]]:
    """The tensors and metadata of a file whose updates are `scale` B A; all of one rank before q, k, v are fused."""
    in_file = bfl(of) if "Y" in naming.module else of
    values: Values = {}
    for path, (a, b) in in_file.items():
        key = naming.module.replace("X_", path.replace(".", "_")).replace("Y_", path.replace(".", "_"))
        key = key if key != naming.module else naming.module.replace("X", path).replace("Y", path)
        values[f"{key}.{naming.factors[0]}"] = a
        values[f"{key}.{naming.factors[1]}"] = b * scale if naming.alpha == "folded" else b
        if naming.alpha == "tensor":
            values[f"{key}.alpha"] = mx.array(scale * a.shape[0])
    if naming.alpha != "metadata":
        return values, {}
    rank = next(iter(of.values()))[0].shape[0]
    fields = {"r": rank, "lora_alpha": scale * rank, "target_modules": list(of)}
    return values, {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in fields.items()})}
