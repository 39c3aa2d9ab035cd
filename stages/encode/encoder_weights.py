"""The text encoder's tensors: which ones encoding needs, what they are called, what they are.

Needs no decoder layers, so that a stage which only compares identities does not import them.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import identity
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import Tensors, open_tensors

EMBEDDING = "embed_tokens.weight"
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


def canonical(tensors: Tensors) -> Tensors:
    """The language model's tensors as `embed_tokens.weight` and `layers.N.…`, whatever stood in front of them."""
    ends = [name for name in tensors.info if name == EMBEDDING or name.endswith("." + EMBEDDING)]
    if len(ends) != 1:
        raise InputError(
            f"{tensors.source}: expected one tensor ending in {EMBEDDING}, found {len(ends)}; this is no text encoder"
        )
    prefix = ends[0].removesuffix(EMBEDDING)
    return tensors.rename(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def is_unused(name: str, spec: TextSpec) -> bool:
    """Whether a canonical name belongs to the model, but not to what encoding reads."""
    if name.startswith("layers."):
        number = name.split(".")[1]
        return number.isdigit() and spec.taps[-1] <= int(number) < spec.layers
    return name in ("norm.weight", "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


def open_encoder(folder: Path, spec: TextSpec) -> Tensors:
    """The checked tensors of an encoder folder under canonical names, those that encoding needs and no others."""
    tensors = canonical(open_tensors(folder))
    expected = tensor_shapes(spec)
    tensors.check(expected, ignore=lambda name: is_unused(name, spec))
    return Tensors(tensors.source, {name: tensors.info[name] for name in expected})


def encoder_identity(tensors: Tensors, spec: TextSpec) -> str:
    """Identity of a text encoder: the tensors up to the last tap, and what its numerics read from the config."""
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
    info = tensors.info[EMBEDDING]
    storage = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}[info.dtype]
    table = np.memmap(info.file, storage, "r", offset=info.start, shape=info.shape)
    used, inverse = np.unique(ids, return_inverse=True)
    rows = mx.array(np.ascontiguousarray(table[used]))
    rows = rows.view(mx.bfloat16) if info.dtype == "BF16" else rows
    return rows.astype(dtype)[mx.array(inverse.reshape(ids.shape).astype(np.uint32))]
