"""The FLUX.2 transformer: its weights in memory, and the forward pass that strings the blocks together.

Letters: B batch, L image tokens, T text tokens, C context channels, D hidden.
Source: diffusers `Flux2Transformer2DModel`. Sigma, guidance and the features of both stay float32 up to the first
product (diffusers rounds them to the model's dtype first, which moves 1000 * sigma by up to 4 in bfloat16).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux2_relay.stages import folders, quantize
from flux2_relay.stages.quantize import Weight
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import base, blocks, embeddings
from flux2_relay.stages.train.blocks import Block, Run, Sizes, Weights, direct
from flux2_relay.stages.train.embeddings import Rotary
from flux2_relay.stages.train.kinds import Adapter
from flux2_relay.stages.train.packed_copy import keeping
from flux2_relay.stages.train.pieces import Pieces
from flux2_relay.stages.train.residence import Reader, Residence, Resident
from flux2_relay.stages.weights import Tensors

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


@dataclass(frozen=True, slots=True)
class Modulation:
    """What sigma and guidance tell the blocks, shared by all of a kind: shifts, scales and gates, each [B, 1, D]."""

    double: tuple[list[mx.array], list[mx.array]]
    """Text and image: shift, scale, gate of attention, then of the MLP."""
    single: list[mx.array]
    """Shift, scale, gate."""
    final: list[mx.array]
    """Scale, shift: diffusers' order."""


@dataclass(slots=True)
class Transformer:
    """One transformer with its adapters; call it for a velocity."""

    spec: TransformerSpec
    dtype: mx.Dtype
    outer: Weights
    residence: Residence
    """The weights of the blocks, double ones first."""
    adapters: dict[str, Adapter] = field(default_factory=dict)
    """Full module path -> what is attached to it; filled by `lora.attach`."""
    keep: int = 0
    """The last blocks whose wide projections the forward pass keeps for the backward pass."""
    attention_heads: int = 0
    """Heads that attention's backward pass takes at a time; 0 is all."""
    joins: bool = False
    """Whether passes of several runs over it may go through its blocks as one batch."""
    pieces: Pieces = field(default_factory=Pieces)
    """Runs pieces compiled and a bounded way ahead, for gradients and for sampling."""
    run: Run = direct
    """How a call runs its pieces: plainly, so that autodiff sees through them, unless set to `pieces`."""

    def __call__(
        self,
        latents: mx.array,
        context: mx.array,
        sigma: mx.array,
        guidance: mx.array | None,
        latent_ids: mx.array,
        text_ids: mx.array,
    ) -> mx.array:
        """Velocity [B, L, 128] at `sigma` [B] in [0, 1].

        latents [B, L, 128], context [B, T, C], guidance [B] or None, latent_ids [L, 4], text_ids [T, 4]. Reference
        tokens follow the target's in `latents` and `latent_ids`; their rows of the result mean nothing.
        """
        modulation, rotary = self.modulation(sigma, guidance), self.rotary(latent_ids, text_ids)
        streams = list(self.embed(latents, context))
        self.residence.announce(range(self.spec.blocks))
        for place in range(self.spec.double_blocks):
            streams = blocks.double_forward(self.run, self.block(place), streams, modulation.double, rotary)[0]
        hidden = mx.concatenate(streams, axis=1)
        for place in range(self.spec.double_blocks, self.spec.blocks):
            hidden = blocks.single_forward(self.run, self.block(place), hidden, modulation.single, rotary)[0]
        return self.output(hidden[:, context.shape[1] :], modulation)

    def block(self, place: int) -> Block:
        """The block at `place` among all blocks, ready to run."""
        prefix = block_path(self.spec, place) + "."
        adapters = {name.removeprefix(prefix): a for name, a in self.adapters.items() if name.startswith(prefix)}
        weights = self.residence.weights(place)
        return Block(weights, adapters, Sizes(self.spec.hidden, self.spec.mlp_width, self.spec.eps))

    def embed(self, latents: mx.array, context: mx.array) -> tuple[mx.array, mx.array]:
        """latents [B, L, 128] and context [B, T, C] -> text [B, T, D] and image [B, L, D], in the compute dtype."""
        text = self._outer(context.astype(self.dtype), "context_embedder")
        return text, self._outer(latents.astype(self.dtype), "x_embedder")

    def output(self, hidden: mx.array, modulation: Modulation) -> mx.array:
        """Image rows [B, L, D] behind the last block -> velocity [B, L, 128]."""
        scale, shift = modulation.final
        return self._outer(blocks.modulate(hidden, shift, scale, self.spec.eps), "proj_out")

    def modulation(self, sigma: mx.array, guidance: mx.array | None) -> Modulation:
        """Shifts, scales and gates of all blocks at sigma [B] and, for guidance-distilled models, guidance [B]."""
        condition = self._time_embedding(sigma, "timestep_embedder")
        if self.spec.guidance and guidance is not None:
            condition = condition + self._time_embedding(guidance, "guidance_embedder")
        condition = nn.silu(condition)

        def parts(name: str, count: int) -> list[mx.array]:
            return blocks.split(self._outer(condition, f"{name}.linear")[:, None], count, axis=-1)

        text, image = parts("double_stream_modulation_txt", 6), parts("double_stream_modulation_img", 6)
        return Modulation((text, image), parts("single_stream_modulation", 3), parts("norm_out", 2))

    def _time_embedding(self, value: mx.array, name: str) -> mx.array:
        thousands = np.asarray(value.astype(mx.float32)) * np.float32(1000)
        features = mx.array(embeddings.time_features(thousands, self.spec.time_channels)).astype(self.dtype)
        first, second = (f"time_guidance_embed.{name}.linear_{n}" for n in (1, 2))
        return self._outer(nn.silu(self._outer(features, first)), second)

    def _outer(self, x: mx.array, name: str) -> mx.array:
        """A linear outside the blocks; training attaches nothing to one, other programs' adapters may."""
        return blocks.linear(x, (self.outer[name], self.adapters.get(name, ())))

    def rotary(self, latent_ids: mx.array, text_ids: mx.array) -> Rotary:
        """The rotary tables of a sequence: text rows first, then image rows."""
        return embeddings.rotary_tables(np.concatenate([np.asarray(text_ids), np.asarray(latent_ids)]), self.spec)


def text_ids(rows: int) -> mx.array:
    """Position ids [rows, 4] of text rows: (0, 0, 0, l), pads counted."""
    return mx.array(np.stack([*[np.zeros(rows, np.int32)] * 3, np.arange(rows, dtype=np.int32)], axis=-1))


def image_ids(height: int, width: int, time: int = 0) -> mx.array:
    """Position ids [height * width, 4] of an image, row-major: (t, row, column, 0); reference k has t = 10 + 10k."""
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int32), width)
    return mx.array(np.stack([np.full_like(rows, time), rows, columns, np.zeros_like(rows)], axis=-1))


def load_transformer(
    model_dir: Path | str,
    spec: TransformerSpec,
    bits: int = 16,
    dtype: mx.Dtype | None = None,
    residence: Callable[[int, Reader], Residence] = Resident,
    copy: Path | None = None,
) -> Transformer:
    """The transformer of a model folder or file, weights kept at `bits` (32 | 16 | 8 | 6 | 4), block by block.

    What the file has packed at no more bits stays as it is.

    `dtype` is the compute type: float32 where `bits` is 32, else bfloat16; `residence(blocks, read)` decides which
    blocks stay in memory; quantized ones are kept in the folder `copy`. InputError lists every tensor that is missing,
    surplus or misshapen.
    """
    tensors = base.open_base(folders.find(str(model_dir)).transformer, base_shapes(spec))
    return from_tensors(tensors, spec, bits, dtype, residence, copy)


def stock_of(place: Path, spec: TransformerSpec) -> base.Stock:
    """What the checkpoint has packed already, by its headers; InputError where they are not those of the model."""
    shapes = base_shapes(spec)
    return base.stock(base.open_base(place, shapes), shapes)


def from_tensors(
    tensors: Tensors,
    spec: TransformerSpec,
    bits: int,
    dtype: mx.Dtype | None = None,
    residence: Callable[[int, Reader], Residence] = Resident,
    copy: Path | None = None,
) -> Transformer:
    """The transformer of checked tensors in diffusers names; never more than one block stands in memory unquantized.

    `residence(blocks, read)` decides which blocks stay in memory; quantized blocks are kept in the folder `copy`.
    """
    dtype = dtype or (mx.float32 if bits == 32 else mx.bfloat16)

    def read_block(place: int) -> dict[str, Weight]:
        return base.read(tensors, block_path(spec, place) + ".", block_shapes(spec, place), bits)

    read: Reader = read_block
    if copy is not None and bits in quantize.QUANTIZED_BITS:
        inside = {place: (block_path(spec, place) + ".", block_shapes(spec, place)) for place in range(spec.blocks)}
        quantized = {place: of for place, of in inside.items() if base.is_repacked(tensors, *of, bits)}
        read = keeping(read, copy, tensors, {p: base.tensors_below(tensors, *of) for p, of in quantized.items()}, bits)
    return Transformer(spec, dtype, base.read(tensors, "", outer_shapes(spec), bits), residence(spec.blocks, read))


def block_path(spec: TransformerSpec, place: int) -> str:
    """The path of the block at `place` among all blocks, double ones first."""
    if place < spec.double_blocks:
        return f"{DOUBLE}.{place}"
    return f"{SINGLE}.{place - spec.double_blocks}"


def block_shapes(spec: TransformerSpec, place: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the block at `place`, by their names inside it."""
    return double_shapes(spec) if place < spec.double_blocks else single_shapes(spec)


def tensor_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the state dict, in diffusers names, with its shape."""
    return {f"{name}.weight": shape for name, shape in base_shapes(spec).items()}


def base_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """The same without `.weight`, which packed tensors have besides others."""
    shapes = outer_shapes(spec)
    for place in range(spec.blocks):
        path = block_path(spec, place)
        shapes |= {f"{path}.{name}": shape for name, shape in block_shapes(spec, place).items()}
    return shapes


def outer_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """The linears outside the blocks, [out, in]."""
    hidden = spec.hidden
    embedders = ["timestep_embedder", *(["guidance_embedder"] if spec.guidance else [])]
    times = {f"time_guidance_embed.{name}.linear_1": (hidden, spec.time_channels) for name in embedders}
    times |= {f"time_guidance_embed.{name}.linear_2": (hidden, hidden) for name in embedders}
    return times | {
        "x_embedder": (hidden, spec.channels),
        "context_embedder": (hidden, spec.context_width),
        "double_stream_modulation_img.linear": (6 * hidden, hidden),
        "double_stream_modulation_txt.linear": (6 * hidden, hidden),
        "single_stream_modulation.linear": (3 * hidden, hidden),
        "norm_out.linear": (2 * hidden, hidden),
        "proj_out": (spec.channels, hidden),
    }


def double_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of one double block: linears [out, in] and norms [head dim]."""
    hidden, mlp = spec.hidden, spec.mlp_width
    linears = "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    norms = "norm_q", "norm_k", "norm_added_q", "norm_added_k"
    shapes: dict[str, tuple[int, ...]] = {f"attn.{name}": (hidden, hidden) for name in linears}
    shapes |= {f"attn.{name}": (spec.head_dim,) for name in norms}
    for stream in ("ff", "ff_context"):
        shapes |= {f"{stream}.linear_in": (2 * mlp, hidden), f"{stream}.linear_out": (hidden, mlp)}
    return shapes


def single_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of one single block: fused linears [out, in] and norms [head dim]."""
    hidden, mlp = spec.hidden, spec.mlp_width
    return {
        "attn.to_qkv_mlp_proj": (3 * hidden + 2 * mlp, hidden),
        "attn.to_out": (hidden, hidden + mlp),
        "attn.norm_q": (spec.head_dim,),
        "attn.norm_k": (spec.head_dim,),
    }


def block_linears(spec: TransformerSpec) -> dict[str, tuple[int, int]]:
    """Full path of every linear of every block -> (out, in): what a LoRA may be attached to."""
    return {
        f"{block_path(spec, place)}.{name}": (shape[0], shape[1])
        for place in range(spec.blocks)
        for name, shape in block_shapes(spec, place).items()
        if len(shape) == 2
    }
