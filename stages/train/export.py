"""The adapter for other programs.

Alpha stands nowhere in the file: alpha / rank is folded into B in float32, the one choice that diffusers, ComfyUI and
mflux read at the same strength.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from flux2_relay.stages.files import write_tensors
from flux2_relay.stages.train.transformer import Transformer

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def write_diffusers(
    transformer: Transformer, path: Path | str, metadata: Mapping[str, str], dtype: mx.Dtype = mx.float32
) -> None:
    """One safetensors file of `transformer.MODULE.lora_A.weight` [r, in] and `….lora_B.weight` [out, r] in `dtype`."""
    values = {}
    for module, (a, b, scale) in transformer.adapters.items():
        values[f"transformer.{module}.lora_A.weight"] = a.astype(dtype)
        values[f"transformer.{module}.lora_B.weight"] = (b * scale).astype(dtype)
    write_tensors(Path(path), values, {"format": "pt", **metadata})
