"""The decoder layers of the text encoders, from mlx-lm, one at a time.

Their arguments are built from our own spec: mlx-lm's config reader for Mistral misses `rope_parameters` and would
silently take another rotary base. Weights keep the layout of `mlx.nn.quantize`.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen3

from flux2_relay.stages.encode.encoder_weights import layer_shapes
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import Tensors

GROUP = 64


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
