"""The decoder layers of the text encoders, from mlx-lm, one at a time.

Their arguments are built from our own spec: mlx-lm's config reader for Mistral misses `rope_parameters` and would
silently take another rotary base. Weights keep the layout of `mlx.nn.quantize`.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3

from flux2_relay.stages import packed
from flux2_relay.stages.encode.encoder_weights import GROUP, layer_packings, layer_shapes, reading_bytes
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import Tensors


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

    A linear whose width does not divide by 64 stays bfloat16. Where the file is packed, what it has packed stays so and
    the rest stays unpacked: `bits` then only says how it computes. Weights are lazy until evaluated.
    """
    layer, dtype = _BLOCKS[spec.family](spec), compute_dtype(bits)
    found = layer_packings(tensors, number, spec)
    plain = [f"layers.{number}.{name}" for name in layer_shapes(spec)]
    values = tensors.read_all((name for name in plain if name.removesuffix(".weight") not in found), dtype)
    if found:
        settings = {_inside(path): asdict(packing) for path, packing in found.items()}
        nn.quantize(layer, class_predicate=lambda path, module: settings.get(path, False))
        values |= packed.read(tensors, found, dtype)
    layer.load_weights([(_inside(name), value) for name, value in values.items()])
    if bits < 16 and not found:
        nn.quantize(layer, group_size=GROUP, bits=bits, class_predicate=_divides)
    return layer


def compute_dtype(bits: int) -> mx.Dtype:
    """What the encoder computes in."""
    return mx.float32 if bits == 32 else mx.bfloat16


def _inside(name: str) -> str:
    """A name inside its layer."""
    return name.split(".", 2)[2]


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
        return _read(self.tensors, number, self.spec, self.bits)


def resident_layers(tensors: Tensors, spec: TextSpec, bits: int) -> list[nn.Module]:
    """The layers up to the last tap, all in memory; read one by one, so that never two stand unquantized."""
    return [_read(tensors, number, spec, bits) for number in range(spec.taps[-1])]


def _read(tensors: Tensors, number: int, spec: TextSpec, bits: int) -> nn.Module:
    """A layer in memory, made one matrix at a time: what it is made from would otherwise stand beside all of it."""
    layer = decoder_layer(tensors, number, spec, bits)
    if reading_bytes(tensors, spec, bits):
        for _, value in tree_flatten(layer.parameters()):
            mx.eval(value)
    mx.eval(layer.parameters())
    return layer


def _divides(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % GROUP == 0
