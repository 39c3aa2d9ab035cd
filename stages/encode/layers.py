"""The decoder layers of the text encoders, from mlx-lm, one at a time.

Their arguments are built from our own spec: mlx-lm's config reader for Mistral misses `rope_parameters` and would
silently take another rotary base. Weights keep the layout of `mlx.nn.quantize`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class StreamedLayers:
    """The layers up to the last tap, read from disk anew each time they are gone through, one ahead."""

    tensors: Tensors
    spec: TextSpec
    bits: int

    def __iter__(self) -> Iterator[nn.Module]:
        """Layer by layer; whoever iterates must let go of a layer before asking for the next."""
        with ThreadPoolExecutor(1, thread_name_prefix="layers") as pool:
            ahead = pool.submit(self._load, 0)
            for number in range(1, self.spec.taps[-1]):
                layer, ahead = ahead.result(), pool.submit(self._load, number)
                yield layer
                del layer
            yield ahead.result()

    def _load(self, number: int) -> nn.Module:
        layer = decoder_layer(self.tensors, number, self.spec, self.bits)
        mx.eval(layer.parameters())
        return layer


def resident_layers(tensors: Tensors, spec: TextSpec, bits: int) -> list[nn.Module]:
    """The layers up to the last tap, all in memory; read one by one, so that never two stand unquantized."""
    layers = []
    for number in range(spec.taps[-1]):
        layers.append(decoder_layer(tensors, number, spec, bits))
        mx.eval(layers[-1].parameters())
    return layers


def layer_bytes(spec: TextSpec, bits: int) -> int:
    """What one layer takes in memory at `bits`; scales and biases of a group are 4 bytes."""
    per_weight = bits / 8 if bits >= 16 else bits / 8 + 4 / GROUP
    sizes = ((shape, math.prod(shape)) for shape in layer_shapes(spec).values())
    return int(sum(size * (per_weight if len(shape) == 2 else 2) for shape, size in sizes))


def _divides(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % GROUP == 0
