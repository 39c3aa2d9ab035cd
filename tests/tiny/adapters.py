"""LoRA files with random factors, in diffusers' names, for a tiny checkpoint."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from tiny import cases

from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.transformer import block_linears, outer_shapes

Factors = dict[str, tuple[mx.array, mx.array]]
"""Module -> A [r, in] and B [out, r]."""


def factors(spec: TransformerSpec, rank: int, seed: int, wanted: Callable[[str], bool] = lambda path: True) -> Factors:
    """Random ones for every linear of the blocks and outside them of which `wanted` approves; no B is zero."""
    shapes: dict[str, tuple[int, ...]] = {**block_linears(spec), **outer_shapes(spec)}
    made = {}
    for path, (rows, columns) in shapes.items():
        if wanted(path):
            names = {f"{path}.lora_A.weight": (rank, columns), f"{path}.lora_B.weight": (rows, rank)}
            a, b = cases.adapter(names, seed).values()
            made[path] = mx.array(a), mx.array(b)
    return made


def write(path: Path, values: Factors, alpha: float | None = None) -> Path:
    """A file of them, with an alpha for each module where it is given."""
    tensors = {}
    for module, (a, b) in values.items():
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        if alpha is not None:
            tensors[f"transformer.{module}.alpha"] = mx.array(alpha)
    mx.save_safetensors(str(path), tensors)
    return path
