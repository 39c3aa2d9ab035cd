"""How ComfyUI makes an adapter of a file part of a weight: its formulas in numpy, module by module in diffusers' names.

Source: its weight adapters `lora` and `lokr`, `weight_decompose` and the key map of FLUX.2, of 2026.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_relay.stages import names

Arrays = dict[str, np.ndarray]
_FUSED = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


def loaded(path: Path, weights: Mapping[str, np.ndarray], strength: float = 1.0) -> Arrays:
    """The weights [out, in], by diffusers' names without `.weight`, after a file was loaded; float64."""
    values = mx.load(str(path))
    assert isinstance(values, dict)
    file = {name: np.array(value.astype(mx.float32), np.float64) for name, value in values.items()}
    found = {name: np.array(weight, np.float64) for name, weight in weights.items()}
    used: set[str] = set()
    for key, modules in _keys(weights).items():
        there = {name.removeprefix(key + "."): v for name, v in file.items() if name.startswith(key + ".")}
        if there:
            used |= {f"{key}.{name}" for name in there}
            whole = np.concatenate([found[module] for module in modules])
            patched = _patched(whole, there, strength)
            found |= dict(zip(modules, np.split(patched, len(modules)), strict=True))
    assert used == file.keys(), f"keys that ComfyUI does not load: {sorted(file.keys() - used)[:3]}"
    return found


def _keys(weights: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Every name that its table has for a module of the blocks -> the weights it patches."""
    known: dict[str, list[str]] = {}
    for path in weights:
        kind, number, inner = path.split(".", 2)
        known |= {f"lycoris_{path.replace('.', '_')}": [path], f"transformer.{path}": [path]}
        table = names.DOUBLE if kind == "transformer_blocks" else names.SINGLE
        bare = "double_blocks" if kind == "transformer_blocks" else "single_blocks"
        for theirs, ours in table.items():
            if ours == inner:
                known[f"diffusion_model.{bare}.{number}.{theirs}"] = [path]
        if kind == "transformer_blocks":
            for theirs, parts in _FUSED.items():
                known[f"diffusion_model.double_blocks.{number}.{theirs}"] = [f"{kind}.{number}.attn.{p}" for p in parts]
    return known


def _patched(weight: np.ndarray, of: Arrays, strength: float) -> np.ndarray:
    if "lokr_w1" in of:
        rank = of["lokr_w2_b"].shape[0] if "lokr_w2_b" in of else None
        w2 = of["lokr_w2"] if rank is None else of["lokr_w2_a"] @ of["lokr_w2_b"]
        scale = 1.0 if rank is None else float(of["alpha"]) / rank
        return weight + strength * scale * np.kron(of["lokr_w1"], w2)
    update = of["lora_B.weight"] @ of["lora_A.weight"]
    if "dora_scale" not in of:
        return weight + strength * update
    assert of["dora_scale"].shape == (len(weight), 1)
    lengths = np.linalg.norm(weight, axis=1, keepdims=True) + np.finfo(np.float32).eps
    return weight + strength * ((weight + update) * (of["dora_scale"] / lengths) - weight)
