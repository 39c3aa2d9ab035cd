"""The layouts that checkpoints come in, read as the one that our code uses: diffusers' names, each part for itself.

A layout is told by the names in the file, never by the file's own name. What a layout fuses (q, k and v in one
matrix) or orders otherwise is described as rows of the file's tensors (`TensorInfo.rows`): nothing is read here, a
block is still read alone, and equal weights have equal identities in every layout.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import fp8
from flux2_relay.stages.weights import TensorInfo, Tensors, open_tensors

Part = Literal["transformer", "text_encoder", "vae"]
Pairs = Iterator[tuple[str, TensorInfo]]

EMBEDDING = "embed_tokens.weight"

# BFL's names of the transformer -> diffusers', without `.weight`.
OUTER: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
SWAPPED: Mapping[str, str] = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
"""Rows are (shift, scale) in BFL's file, (scale, shift) in diffusers'."""
DOUBLE: Mapping[str, str] = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
FUSED: Mapping[str, tuple[str, str, str]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Three equal stretches of rows."""
SINGLE: Mapping[str, str] = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_PACKED = ("scales", "biases")
"""What a matrix that MLX has packed has besides its weight: as many rows, so it is cut the same way."""

# BFL's names of the VAE -> diffusers', in the order in which they are applied.
_VAE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^encoder\.quant_conv\.", "quant_conv."),
        (r"^decoder\.post_quant_conv\.", "post_quant_conv."),
        (r"\.down\.(\d+)\.", r".down_blocks.\1."),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
        (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )
)
_LEVEL = re.compile(r"^decoder\.up\.(\d+)\.")

# Names that only this part has, in each layout: what stands before them is the file's prefix.
_BFL_SIGNS = ("single_stream_modulation.lin.weight", "double_stream_modulation_img.lin.weight")
_SIGNS: Mapping[Part, tuple[str, ...]] = {
    "transformer": (
        "single_stream_modulation.linear.weight",
        "double_stream_modulation_img.linear.weight",
        *_BFL_SIGNS,
    ),
    "text_encoder": (EMBEDDING,),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
}


def parts_in(names: Iterable[str]) -> frozenset[Part]:
    """Which parts of a model a file with these tensors holds: none, one, or several."""
    names = set(names)
    return frozenset(part for part in _SIGNS if _prefixes(names, part))


def layout_of(part: Part, names: Iterable[str]) -> str:
    """The layout in a word, for tables: `BFL`, `diffusers`, `packed` or `plain`, with the prefix where there is one."""
    names = set(names)
    prefix = min(_prefixes(names, part), default="")
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if part == "text_encoder":
        return "packed" if any(name.endswith(".scales") for name in inside) else "plain"
    bfl = _is_bfl_vae(inside) if part == "vae" else _is_bfl_transformer(inside)
    return ("BFL" if bfl else "diffusers") + (f", prefix {prefix}" if prefix else "")


def open_transformer(place: Path) -> Tensors:
    """The transformer in a folder or file, under diffusers' names."""
    return transformer(open_tensors(place))


def open_vae(place: Path) -> Tensors:
    """The autoencoder in a folder or file, under diffusers' names."""
    return vae(open_tensors(place))


def transformer(tensors: Tensors) -> Tensors:
    """A transformer's tensors under diffusers' names; a name of no layout stays, for `check` to complain of."""
    inside = _inside(tensors, "transformer")
    if not _is_bfl_transformer(inside.info):
        return inside
    return Tensors(inside.source, dict(pair for item in inside.info.items() for pair in _transformer(*item)))


def vae(tensors: Tensors) -> Tensors:
    """An autoencoder's tensors under diffusers' names."""
    inside = _inside(tensors, "vae")
    if not _is_bfl_vae(inside.info):
        return inside
    levels = [int(found[1]) for name in inside.info if (found := _LEVEL.match(name))]
    last = max(levels, default=0)
    return Tensors(inside.source, {_vae_name(name, last): _flat(name, info) for name, info in inside.info.items()})


def text_encoder(tensors: Tensors) -> Tensors:
    """The language model's tensors as `embed_tokens.weight` and `layers.N.…`, whatever stood in front of them."""
    return _inside(tensors, "text_encoder")


def _inside(tensors: Tensors, part: Part) -> Tensors:
    """The tensors of one part without the prefix that files of several parts give it."""
    prefixes = _prefixes(tensors.info, part)
    if len(prefixes) != 1:
        expected = " or ".join(_SIGNS[part])
        raise InputError(
            f"{tensors.source}: expected one tensor ending in {expected}, found {len(prefixes)}; "
            f"this is no {part.replace('_', ' ')}"
        )
    (prefix,) = prefixes
    inside = tensors.rename(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
    return fp8.with_scales(inside, part)


def _prefixes(names: Iterable[str], part: Part) -> set[str]:
    return {
        name.removesuffix(sign)
        for name in names
        for sign in _SIGNS[part]
        if name.endswith(sign) and name[: -len(sign)][-1:] in ("", ".")
    }


def _transformer(name: str, info: TensorInfo) -> Pairs:
    """A tensor of BFL's file as the one or three of diffusers' that it holds."""
    path, _, kind = name.rpartition(".")
    part = kind if kind in _PACKED else "weight"  # a norm's is called `scale`
    if kind not in ("weight", "scale", *_PACKED):
        yield name, info
    elif found := _BLOCK.fullmatch(path):
        for renamed, rows in _block(found[1], found[2], found[3], info):
            yield f"{renamed}.{part}" if renamed else name, rows
    elif path in SWAPPED and info.shape:
        half = info.shape[0] // 2
        yield f"{SWAPPED[path]}.{part}", info.take_rows((half, info.shape[0]), (0, half))
    else:
        yield f"{OUTER[path]}.{part}" if path in OUTER else name, info


def _block(kind: str, number: str, inner: str, info: TensorInfo) -> Pairs:
    """The same for a tensor of a block, without its last part; an empty name for one that is not known."""
    block = f"transformer_blocks.{number}" if kind == "double" else f"single_transformer_blocks.{number}"
    if kind == "double" and inner in FUSED and info.shape:
        third = info.shape[0] // 3
        for place, part in enumerate(FUSED[inner]):
            yield f"{block}.{part}", info.take_rows((place * third, (place + 1) * third))
        return
    known = DOUBLE if kind == "double" else SINGLE
    yield f"{block}.{known[inner]}" if inner in known else "", info


def _is_bfl_transformer(names: Iterable[str]) -> bool:
    return any(name in _BFL_SIGNS for name in names)


def _is_bfl_vae(names: Iterable[str]) -> bool:
    return any(name.startswith(("encoder.down.", "decoder.up.")) for name in names)


def _vae_name(name: str, last: int) -> str:
    """diffusers' name of a tensor of BFL's VAE; the decoder's levels are counted from the other end."""
    name = _LEVEL.sub(lambda found: f"decoder.up_blocks.{last - int(found[1])}.", name)
    for pattern, new in _VAE:
        name = pattern.sub(new, name)
    return name


def _flat(name: str, info: TensorInfo) -> TensorInfo:
    """BFL writes the attention's matrices as 1x1 kernels."""
    is_kernel = ".attn_1." in name and len(info.shape) == 4 and info.shape[2:] == (1, 1)
    return info.reshape(info.shape[:2]) if is_kernel else info
