"""Tiny checkpoints in the layouts that other tools write: BFL's and ComfyUI's single files, MLX's packed folders."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_relay.stages import names

Values = dict[str, mx.array]


def load(path: Path) -> Values:
    """All tensors of a folder's only safetensors file, or of a file."""
    (file,) = [path] if path.is_file() else path.glob("*.safetensors")
    values = mx.load(str(file))
    assert isinstance(values, dict)
    return values


def bfl_transformer(values: Mapping[str, mx.array], norm: str = "scale") -> Values:
    """diffusers' tensors as BFL's file has them: fused q, k, v, shift before scale; norms end in `norm`."""
    blocks = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
    flat = {new: old for table in (names.OUTER, names.SWAPPED) for old, new in table.items()}
    inner = {
        "transformer_blocks": {new: old for old, new in names.DOUBLE.items()},
        "single_transformer_blocks": {new: old for old, new in names.SINGLE.items()},
    }
    fused = {part: (old, place) for old, parts in names.FUSED.items() for place, part in enumerate(parts)}
    thirds: dict[str, dict[int, mx.array]] = {}
    made: Values = {}
    for name, value in values.items():
        path = name.removesuffix(".weight")
        kind, _, rest = path.partition(".")
        if kind not in blocks:
            halves = mx.split(value, 2) if path in names.SWAPPED.values() else None
            made[f"{flat[path]}.weight"] = mx.concatenate([halves[1], halves[0]]) if halves else value
            continue
        number, _, part = rest.partition(".")
        if kind == "transformer_blocks" and part in fused:
            old, place = fused[part]
            thirds.setdefault(f"double_blocks.{number}.{old}.weight", {})[place] = value
        else:
            old = inner[kind][part]
            made[f"{blocks[kind]}.{number}.{old}.{norm if old.endswith('_norm') else 'weight'}"] = value
    return made | {name: mx.concatenate([parts[place] for place in range(3)]) for name, parts in thirds.items()}


def bfl_vae(values: Mapping[str, mx.array], levels: int = 4) -> Values:
    """diffusers' tensors as BFL's `ae.safetensors` has them: levels of the decoder reversed, attention as kernels."""
    return {_bfl_vae_name(name, levels): _kernel(name, value) for name, value in values.items()}


def _bfl_vae_name(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    for old, new in (
        (r"down_blocks\.", "down."),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"\.resnets\.", ".block."),
        (r"downsamplers\.0", "downsample"),
        (r"upsamplers\.0", "upsample"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("^quant_conv", "encoder.quant_conv"),
        ("^post_quant_conv", "decoder.post_quant_conv"),
    ):
        name = re.sub(old, new, name)
    return name


def _kernel(name: str, value: mx.array) -> mx.array:
    return value[:, :, None, None] if ".attentions." in name and value.ndim == 2 else value


def save(path: Path, values: Mapping[str, mx.array], prefix: str = "") -> Path:
    """A safetensors file whose names begin with `prefix`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), {prefix + name: value for name, value in values.items()})
    return path


def retype(file: Path, types: Mapping[str, str]) -> Path:
    """Change what a safetensors file says of the types of some tensors: bytes that MLX saved may be fp8."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, dtype in types.items():
        header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return file


Settings = Mapping[str, Any] | bool
"""Arguments of `mx.quantize`, or False: leave this module as it is."""


def pack_encoder(
    source: Path, target: Path, settings: Mapping[str, Any], choose: Callable[[str], Settings] = lambda path: True
) -> Path:
    """A text-encoder folder as mlx-lm writes it; `choose(module path)` may set one apart, as its config then says."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    said: dict[str, Any] = dict(settings)
    made: Values = {}
    for name, value in load(source).items():
        path = name.removesuffix(".weight")
        own = choose(path) if value.ndim == 2 and "vision" not in path else False
        if own is not True and value.ndim == 2:
            said[path] = own
        if own is False:
            made[name] = value
        else:
            arguments = settings if own is True else own
            assert isinstance(arguments, Mapping)
            parts = mx.quantize(value, **arguments)
            made |= {
                f"{path}.{part}": array for part, array in zip(("weight", "scales", "biases"), parts, strict=False)
            }
    save(target / "model.safetensors", made)
    (target / "config.json").write_text(json.dumps({**config, "quantization": said, "quantization_config": said}))
    return target


def unpack_encoder(packed: Path, target: Path) -> Path:
    """The same encoder with every packed matrix made dense again, as an ordinary folder in float32."""
    config = json.loads((packed / "config.json").read_text())
    said = config.pop("quantization")
    del config["quantization_config"]
    values = load(packed)
    made: Values = {}
    for name, value in values.items():
        path, _, part = name.rpartition(".")
        if f"{path}.scales" not in values:
            made[name] = value
        elif part == "weight":
            own = said.get(path, {key: said[key] for key in ("bits", "group_size", "mode") if key in said})
            dense = mx.dequantize(value, values[f"{path}.scales"], values.get(f"{path}.biases"), **own)
            made[name] = dense.astype(mx.float32)
    save(target / "model.safetensors", made)
    (target / "config.json").write_text(json.dumps(config))
    return target


def copy_without(source: Path, target: Path, *parts: str) -> Path:
    """A checkpoint folder without some of its parts."""
    return Path(shutil.copytree(source, target, ignore=lambda _, found: [name for name in found if name in parts]))
