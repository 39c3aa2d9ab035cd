"""The text encoder's tensors: which ones encoding needs, what they are called, what they are.

Needs no decoder layers, so that a stage which only compares identities does not import them.
"""

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_relay.stages import identity, names, packed
from flux2_relay.stages.names import EMBEDDING
from flux2_relay.stages.packed import Packing
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import FP8, TensorInfo, Tensors, from_fp8, open_tensors

GROUP = 64
"""Weights that share a scale where we quantize an encoder ourselves."""
_HEAD_NORMS = {"qwen3": ("q_norm", "k_norm")}


def layer_shapes(spec: TextSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder layer, by their names inside it."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (spec.hidden,),
        "post_attention_layernorm.weight": (spec.hidden,),
        "self_attn.q_proj.weight": (queries, spec.hidden),
        "self_attn.k_proj.weight": (keys, spec.hidden),
        "self_attn.v_proj.weight": (keys, spec.hidden),
        "self_attn.o_proj.weight": (spec.hidden, queries),
        "mlp.gate_proj.weight": (spec.mlp_width, spec.hidden),
        "mlp.up_proj.weight": (spec.mlp_width, spec.hidden),
        "mlp.down_proj.weight": (spec.hidden, spec.mlp_width),
    }
    return shapes | {f"self_attn.{name}.weight": (spec.head_dim,) for name in _HEAD_NORMS.get(spec.family, ())}


def tensor_shapes(spec: TextSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that encoding needs: the embedding and the layers up to the last tap."""
    shapes = {f"layers.{i}.{name}": shape for i in range(spec.taps[-1]) for name, shape in layer_shapes(spec).items()}
    return {EMBEDDING: (spec.vocabulary, spec.hidden)} | shapes


def is_unused(name: str, spec: TextSpec) -> bool:
    """Whether a canonical name belongs to the model, but not to what encoding reads."""
    if name.startswith("layers."):
        number = name.split(".")[1]
        return number.isdigit() and spec.taps[-1] <= int(number) < spec.layers
    return name == "norm.weight" or name.startswith("lm_head.") or name.endswith("rotary_emb.inv_freq")


def open_encoder(place: Path, spec: TextSpec) -> Tensors:
    """The checked tensors of an encoder's folder or file under canonical names, only those that encoding needs.

    Matrices that MLX has packed before stand there as they are, each with its scales.
    """
    tensors = names.text_encoder(open_tensors(place))
    expected, found = tensor_shapes(spec), encoder_packings(tensors, spec)
    packed.check_settings(place, tensors, found)
    of_packed = {f"{path}.{part}" for path, packing in found.items() for part in packed.parts(packing)}
    tensors.check(
        {name: shape for name, shape in expected.items() if name not in of_packed},
        ignore=lambda name: name in of_packed or is_unused(name, spec),
    )
    return Tensors(tensors.source, {name: tensors.info[name] for name in sorted({*expected, *of_packed})})


def encoder_packings(tensors: Tensors, spec: TextSpec) -> dict[str, Packing]:
    """Module path -> packing of everything that encoding needs and that is packed; empty for an ordinary encoder."""
    return packed.packings(tensors, tensor_shapes(spec))


def layer_packings(tensors: Tensors, number: int, spec: TextSpec) -> dict[str, Packing]:
    """The same for one layer."""
    return packed.packings(tensors, {f"layers.{number}.{name}": shape for name, shape in layer_shapes(spec).items()})


def layer_bytes(spec: TextSpec, bits: int, source: Tensors | None = None) -> int:
    """What one layer takes in memory at `bits`, scales and biases 4 bytes a group, or as a `source` that is packed."""
    if source is not None and layer_packings(source, 0, spec):
        return sum(info.end - info.start for name, info in source.info.items() if name.startswith("layers.0."))
    per_weight = bits / 8 if bits >= 16 else bits / 8 + 4 / GROUP
    sizes = ((shape, math.prod(shape)) for shape in layer_shapes(spec).values())
    return int(sum(size * (per_weight if len(shape) == 2 else 2) for shape, size in sizes))


def reading_bytes(source: Tensors, spec: TextSpec, bits: int) -> int:
    """What else stands in memory while a matrix of a layer is made: the file's values, and those between."""
    wanted = "F32" if bits == 32 else "BF16"
    found = encoder_packings(source, spec)
    most = 0
    for name, info in source.info.items():
        if name == EMBEDDING or len(info.shape) < 2 or name.rpartition(".")[0] in found:
            continue
        of_file = 0 if info.dtype == wanted else info.end - info.start
        between = (4 if info.dtype == FP8 else 0) + (2 if bits < 16 and not found else 0)
        most = max(most, of_file + between * math.prod(info.shape))
    return most


def encoder_identity(tensors: Tensors, spec: TextSpec) -> str:
    """Identity of a text encoder: the tensors up to the last tap, and what its numerics read from the config.

    How a matrix is packed follows from the types and shapes of its tensors, which are in.
    """
    config = {
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "rope_theta": repr(spec.rope_theta),
        "eps": repr(spec.eps),
    }
    return identity.weights_identity(tensors, tensors.info, config)


def embedding_rows(tensors: Tensors, ids: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Rows `ids` [...] of the embedding table -> [..., H], gathered from the file: the table itself is never loaded."""
    used, inverse = np.unique(ids, return_inverse=True)
    hidden = tensors.info["layers.0.input_layernorm.weight"].shape[0]
    found = packed.packings(tensors, {EMBEDDING: (tensors.info[EMBEDDING].shape[0], hidden)})
    if found:
        ((path, packing),) = found.items()
        parts = {part: _gather(tensors.info[f"{path}.{part}"], used) for part in packed.parts(packing)}
        rows = packed.unpack(parts, packing, tensors.source)
    else:
        rows = _embedded(tensors.info[EMBEDDING], used)
    return rows.astype(dtype)[mx.array(inverse.reshape(ids.shape).astype(np.uint32))]


_STORAGE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1", FP8: "u1"}


def _embedded(info: TensorInfo, rows: np.ndarray) -> mx.array:
    values = _gather(info, rows)
    if info.dtype != FP8:
        return values
    if info.scale is None:
        return from_fp8(values, None)
    scale = replace(info.scale, shape=(math.prod(info.scale.shape),))
    return from_fp8(values, _gather(scale, rows if scale.shape[0] > 1 else np.array([0])))


def _gather(info: TensorInfo, rows: np.ndarray) -> mx.array:
    table = np.memmap(info.file, np.dtype(_STORAGE[info.dtype]), "r", offset=info.start, shape=info.shape)
    values = mx.array(np.ascontiguousarray(table[rows]))
    return values.view(mx.bfloat16) if info.dtype == "BF16" else values
