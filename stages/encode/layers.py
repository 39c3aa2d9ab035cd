"""The decoder layers of the text encoders, from mlx-lm, one at a time.

Their arguments are built from our own spec: mlx-lm's config reader for Mistral misses `rope_parameters` and would
silently take another rotary base. Weights keep the layout of `mlx.nn.quantize`.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama, qwen3

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import Tensors

GROUP = 64
EMBEDDING = "embed_tokens.weight"


def _mistral(spec: TextSpec) -> nn.Module:
    return llama.TransformerBlock(
        llama.ModelArgs(
            model_type="mistral",
            hidden_size=spec.hidden,
            num_hidden_layers=spec.layers,
            intermediate_size=spec.mlp_width,
            num_attention_heads=spec.heads,
            rms_norm_eps=spec.eps,
            vocab_size=spec.vocabulary,
            head_dim=spec.head_dim,
            num_key_value_heads=spec.kv_heads,
            rope_theta=spec.rope_theta,
        )
    )


def _qwen3(spec: TextSpec) -> nn.Module:
    return qwen3.TransformerBlock(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=spec.hidden,
            num_hidden_layers=spec.layers,
            intermediate_size=spec.mlp_width,
            num_attention_heads=spec.heads,
            rms_norm_eps=spec.eps,
            vocab_size=spec.vocabulary,
            num_key_value_heads=spec.kv_heads,
            max_position_embeddings=spec.length,
            head_dim=spec.head_dim,
            tie_word_embeddings=True,
            rope_theta=spec.rope_theta,
        )
    )


_BLOCKS: Mapping[str, Callable[[TextSpec], nn.Module]] = {"mistral": _mistral, "qwen3": _qwen3}
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
        raise InputError(f"{tensors.source}: expected one tensor ending in {EMBEDDING}, found {len(ends)}; this is no text encoder")
    prefix = ends[0].removesuffix(EMBEDDING)
    return tensors.rename(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def is_unused(name: str, spec: TextSpec) -> bool:
    """Whether a canonical name belongs to the model, but not to what encoding reads."""
    if name.startswith("layers."):
        number = name.split(".")[1]
        return number.isdigit() and spec.taps[-1] <= int(number) < spec.layers
    return name in ("norm.weight", "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


def decoder_layer(tensors: Tensors, number: int, spec: TextSpec, bits: int) -> nn.Module:
    """Layer `number` (from 0) with its weights at `bits`: 32 float32, 16 bfloat16, else affine in groups of 64.

    A linear whose width does not divide by 64 stays bfloat16. Weights are lazy until evaluated.
    """
    layer = _BLOCKS[spec.family](spec)
    names = [f"layers.{number}.{name}" for name in layer_shapes(spec)]
    values = tensors.read_all(names, mx.float32 if bits == 32 else mx.bfloat16)
    layer.load_weights([(name.split(".", 2)[2], value) for name, value in values.items()])
    if bits < 16:
        nn.quantize(layer, group_size=GROUP, bits=bits, class_predicate=_divides)
    return layer


def _divides(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % GROUP == 0


def embedding_rows(tensors: Tensors, ids: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Rows `ids` [...] of the embedding table -> [..., H], gathered from the file: the table itself is never loaded."""
    info = tensors.info[EMBEDDING]
    storage = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}[info.dtype]
    table = np.memmap(info.file, storage, "r", offset=info.start, shape=info.shape)
    used, inverse = np.unique(ids, return_inverse=True)
    rows = mx.array(np.ascontiguousarray(table[used]))
    rows = rows.view(mx.bfloat16) if info.dtype == "BF16" else rows
    return rows.astype(dtype)[mx.array(inverse.reshape(ids.shape).astype(np.uint32))]
