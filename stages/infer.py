"""Specs from the shapes of the tensors, for files that carry no config.

Everything that shapes tell is taken from them; what they do not tell is the same in every released model, or comes
from the catalogue of the three text encoders.
"""

import re
from collections.abc import Iterable, Mapping
from math import isqrt

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.catalogue import ENCODERS
from flux2_relay.stages.sizes import TextSpec, TransformerSpec, VaeSpec
from flux2_relay.stages.weights import Tensors


def transformer_spec(tensors: Tensors) -> TransformerSpec:
    """The spec of a transformer under diffusers' names; its four rotary axes share the head size evenly."""
    shape = _Shapes(tensors, "transformer")
    hidden, channels = shape("x_embedder.weight")
    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight")
    if head_dim % 8:
        raise InputError(f"{tensors.source}: a head of {head_dim} does not split into four rotary axes of pairs")
    return TransformerSpec(
        double_blocks=_count(tensors.info, r"transformer_blocks\.(\d+)\."),
        single_blocks=_count(tensors.info, r"single_transformer_blocks\.(\d+)\."),
        heads=hidden // head_dim,
        head_dim=head_dim,
        context_width=shape("context_embedder.weight")[1],
        guidance=any(".guidance_embedder." in name for name in tensors.info),
        channels=channels,
        mlp_ratio=shape("transformer_blocks.0.ff.linear_out.weight")[1] / hidden,
        time_channels=shape("time_guidance_embed.timestep_embedder.linear_1.weight")[1],
        rope_axes=(head_dim // 4,) * 4,
    )


def text_spec(tensors: Tensors) -> TextSpec:
    """The spec of a known text encoder under canonical names, packed or not, whole or cut behind the last tap."""
    shape = _Shapes(tensors, "text encoder")
    found = {  # rows are never packed
        "hidden": shape("layers.0.input_layernorm.weight")[0],
        "mlp_width": shape("layers.0.mlp.gate_proj.weight")[0],
        "queries": shape("layers.0.self_attn.q_proj.weight")[0],
        "keys": shape("layers.0.self_attn.k_proj.weight")[0],
        "vocabulary": shape("embed_tokens.weight")[0],
        "family": "qwen3" if "layers.0.self_attn.q_norm.weight" in tensors.info else "mistral",
    }
    for spec in ENCODERS.values():
        if found == {
            "hidden": spec.hidden,
            "mlp_width": spec.mlp_width,
            "queries": spec.heads * spec.head_dim,
            "keys": spec.kv_heads * spec.head_dim,
            "vocabulary": spec.vocabulary,
            "family": spec.family,
        }:
            return spec
    sizes = ", ".join(f"{name} {value}" for name, value in found.items())
    raise InputError(
        f"{tensors.source}: has no config.json beside it and the sizes of no known text encoder ({sizes}); FLUX.2 "
        f"reads its captions with {', '.join(ENCODERS)}. Put the encoder's own config.json beside the file"
    )


def vae_spec(tensors: Tensors) -> VaeSpec:
    """The spec of an autoencoder under diffusers' names; group norms and epsilon are as in the released model."""
    shape, names = _Shapes(tensors, "VAE"), tensors.info
    widths = _widths(tensors, "encoder.down_blocks")
    of_decoder = tuple(reversed(_widths(tensors, "decoder.up_blocks")))
    latents = max(1, shape("encoder.conv_out.weight")[0] // 2)  # mean, then log-variance
    side = max(1, isqrt(shape("bn.running_mean")[0] // latents))
    return VaeSpec(
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
        latent_channels=latents,
        block_out_channels=widths,
        decoder_block_out_channels=of_decoder if of_decoder != widths else None,
        layers_per_block=_count(names, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        patch=(side, side),
        attention=any(name.startswith("encoder.mid_block.attentions.") for name in names),
        quant_conv="quant_conv.weight" in names,
        post_quant_conv="post_quant_conv.weight" in names,
    )


def _widths(tensors: Tensors, blocks: str) -> tuple[int, ...]:
    shape = _Shapes(tensors, "VAE")
    levels = _count(tensors.info, re.escape(blocks) + r"\.(\d+)\.")
    return tuple(shape(f"{blocks}.{level}.resnets.0.conv1.weight")[0] for level in range(levels))


def _count(names: Iterable[str], pattern: str) -> int:
    """How many blocks are numbered under a pattern: the largest number and one."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


class _Shapes:
    """Shapes by name; a name that is missing or of another rank says what file is not what it should be."""

    _RANKS: Mapping[str, int] = {"norm": 1, "bn.": 1, "conv": 4}

    def __init__(self, tensors: Tensors, what: str) -> None:
        self.tensors, self.what = tensors, what

    def __call__(self, name: str) -> tuple[int, ...]:
        info = self.tensors.info.get(name)
        rank = next((rank for sign, rank in self._RANKS.items() if sign in name), 2)
        if info is None or len(info.shape) != rank or 0 in info.shape:
            found = "is missing" if info is None else f"has shape {list(info.shape)}"
            raise InputError(f"{self.tensors.source}: is no {self.what} of FLUX.2: {name} {found}")
        return info.shape
