"""The two kinds of block, forward, as pieces: pure functions of arrays that are compiled one by one.

Weights and adapters are arguments, never captured: one compiled piece serves every block of a kind, resident or
streamed, and gradients cannot be lost to a closure. `backward.py` pulls cotangents through the same pieces. A `Run`
calls a piece; it decides whether to compile it and how far ahead to dispatch it.

Letters: B batch, L image tokens, T text tokens, D hidden, N heads, d head dim, M MLP width.
Source: diffusers `Flux2Transformer2DModel`; gates are raw, scales enter as 1 + scale, attention has no mask.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux2_relay.stages import kernels
from flux2_relay.stages.quantize import Weight, dense, product
from flux2_relay.stages.train.cuts import split
from flux2_relay.stages.train.embeddings import Rotary
from flux2_relay.stages.train.kinds import Adapter

Weights = Mapping[str, Weight]
"""The weights of one block (or of the parts outside the blocks) by name."""
Adapters = Mapping[str, Adapter]
"""Linear's name inside its block -> adapter; absent where a linear has none."""
Linear = tuple[Weight, Adapter | tuple[()]]
"""One linear with what is attached to it."""
Norms = tuple[mx.array, mx.array]
"""Weights [d] of the RMS norms of q and k."""
Modulations = Sequence[mx.array]
"""Shift, scale, gate [B, 1, D] of a single block's one part; of a double block's attention and then its MLP."""
Run = Callable[..., Any]
"""run(piece, *arguments) -> what the piece returns."""


def direct(piece: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - whatever the piece takes and returns
    """Call a piece as it is: for plain autodiff, which cannot see through compiled functions."""
    return piece(*arguments)


class Sizes(NamedTuple):
    """The numbers of a spec that pieces need; a tuple, so that compiled pieces take it as a constant."""

    hidden: int
    mlp: int
    eps: float


def linear(x: mx.array, layer: Linear) -> mx.array:
    """x [..., in] -> [..., out]: the base product, and what an adapter makes of it."""
    weight, adapter = layer
    if not adapter:
        return product(x, weight)
    return adapter.apply(x, dense(weight, x.shape[-1], x.dtype))


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Layer norm without affine, then (1 + scale) x + shift; x [B, L, D], shift and scale [B, 1, D]."""
    if x.shape[0] == 1:  # inside the kernel: a pass over x saved
        return mx.fast.layer_norm(x, (1 + scale).reshape(-1), shift.reshape(-1), eps)
    return (1 + scale) * mx.fast.layer_norm(x, None, None, eps) + shift


def gated(x: mx.array) -> mx.array:
    """silu(gate) * up of [..., 2M] -> [..., M], gate first."""
    gate, up = split(x, 2, axis=-1)
    return nn.silu(gate) * up


def heads_of(x: mx.array, width: int) -> mx.array:
    """[B, L, N*d] -> [B, N, L, d] for heads of `width` d."""
    return x.reshape(*x.shape[:2], -1, width).transpose(0, 2, 1, 3)


def rows_of(x: mx.array) -> mx.array:
    """[B, N, L, d] -> [B, L, N*d]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def paired(wide: mx.array, width: int, sizes: Sizes) -> tuple[mx.array, mx.array]:
    """Of a projection [B, rows, 3D or wider]: q and k together [B, rows, 2, N, d], and v [B, rows, D].

    Together they take half the kernels; in memory of their own, as every kernel behind would copy a strided one.
    """
    hidden = sizes.hidden
    places = [2 * hidden, 3 * hidden] if wide.shape[-1] > 3 * hidden else [2 * hidden]
    both, value = split(wide, places, axis=-1)[:2]
    return mx.contiguous(both).reshape(*wide.shape[:2], 2, -1, width), value


def turning(norms: Norms, rotary: Rotary) -> tuple[mx.array, mx.array, mx.array]:
    """What turns q and k [B, rows, 2, N, d] and applies their norms' weights, [rows, 2, 1, d] float32 each.

    x -> x cos' + swapped(x) sin'; the third is the sin' of the way back.
    """
    cos, sin = (mx.repeat(table, 2, axis=-1)[:, None] for table in rotary)
    weights = mx.stack([norm.astype(mx.float32) for norm in norms])
    neighbours = mx.concatenate(split(weights.reshape(2, -1, 2), 2, axis=-1)[::-1], axis=-1).reshape(weights.shape)
    return tuple(table[:, :, None] for table in (cos * weights, sin * neighbours, -sin * weights))  # pyright: ignore


def turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """x cos + swapped(x) sin in float32, back in x's dtype."""
    return (x.astype(mx.float32) * cos + swapped(x).astype(mx.float32) * sin).astype(x.dtype)


def swapped(x: mx.array) -> mx.array:
    """Each pair (2j, 2j + 1) of x [..., d] as (-second, first).

    In 16 bit as a product with a signed permutation, which is exact and takes half the time of moving them; float32
    products are rounded on some devices.
    """
    if x.dtype == mx.float32:
        first, second = split(x.reshape(*x.shape[:-1], -1, 2), 2, axis=-1)
        return mx.concatenate([-second, first], axis=-1).reshape(x.shape)
    return x @ _swap(x.shape[-1], x.dtype)


@lru_cache(maxsize=4)
def _swap(width: int, dtype: mx.Dtype) -> mx.array:
    places, matrix = np.arange(width), np.zeros((width, width), np.float32)
    matrix[places ^ 1, places] = np.where(places % 2 == 0, -1, 1)
    return mx.array(matrix, dtype)


def stream_tables(wide: Sequence[mx.array], rotary: Rotary) -> list[Rotary]:
    """The rotary tables of each stream's rows."""
    if len(wide) == 1:
        return [rotary]
    pairs = [split(table, [wide[0].shape[1]], axis=0) for table in rotary]
    return list(zip(*pairs, strict=True))


def turned_heads(wide: Sequence[mx.array], scales: Sequence[Norms], rotary: Rotary, sizes: Sizes) -> list[mx.array]:
    """Projections to what attention takes: q, k, v [B, N, rows, d], q and k normalised and turned.

    `wide` is one [B, rows, 3D or wider] a stream (text before image), beginning with q, k and v; `scales` its norms.
    """
    both, values, width = [], [], scales[0][0].shape[0]
    for projected, norms, tables in zip(wide, scales, stream_tables(wide, rotary), strict=True):
        pair, value = paired(projected, width, sizes)
        cos, sin, _ = turning(norms, tables)
        both.append(turn(mx.fast.rms_norm(pair, None, sizes.eps), cos, sin))
        values.append(value)
    pair, value = (mx.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in (both, values))
    query, key = split(pair.transpose(2, 0, 3, 1, 4), 2, axis=0)  # an index would be a gather
    return [query.squeeze(0), key.squeeze(0), heads_of(value, width)]


def enter(x: mx.array, modulation: Sequence[mx.array], layers: Sequence[Linear], eps: float) -> mx.array:
    """Modulated x [B, L, D] through linears that share it, their outputs side by side."""
    x = modulate(x, modulation[0], modulation[1], eps)
    outputs = [linear(x, layer) for layer in layers]
    return mx.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]


def leave(x: mx.array, gate: mx.array, inner: Sequence[mx.array], layer: Linear) -> mx.array:
    """x + gate * linear(inner), where `inner` are pieces of the linear's input side by side."""
    joined = mx.concatenate(list(inner), axis=-1) if len(inner) > 1 else inner[0]
    return x + gate * linear(joined, layer)


def single_middle(wide: mx.array, scales: Norms, rotary: Rotary, sizes: Sizes) -> list[mx.array]:
    """The fused projection of a single block -> attention's output [B, rows, D] and the MLP's [B, rows, M]."""
    heads = turned_heads([wide], [scales], rotary, sizes)
    return [rows_of(kernels.attention(*heads)), gated(single_parts(wide, sizes)[1])]


def single_parts(wide: mx.array, sizes: Sizes) -> list[mx.array]:
    """The fused projection -> q, k, v side by side [B, rows, 3D], and gate, up [B, rows, 2M]."""
    return split(wide, [3 * sizes.hidden], axis=-1)


def double_middle(wide: Sequence[mx.array], scales: Sequence[Norms], rotary: Rotary, sizes: Sizes) -> list[mx.array]:
    """q, k, v [B, T, 3D] of text and [B, L, 3D] of image -> attention's output for each, [B, T, D] and [B, L, D]."""
    joined = rows_of(kernels.attention(*turned_heads(wide, scales, rotary, sizes)))
    return split(joined, [wide[0].shape[1]], axis=1)


@dataclass(frozen=True, slots=True)
class Stream:
    """Names inside a double block of what belongs to one stream."""

    qkv: tuple[str, str, str]
    norms: tuple[str, str]
    out: str
    mlp: tuple[str, str]


STREAMS = (
    Stream(
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ("attn.norm_added_q", "attn.norm_added_k"),
        "attn.to_add_out",
        ("ff_context.linear_in", "ff_context.linear_out"),
    ),
    Stream(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.norm_q", "attn.norm_k"),
        "attn.to_out.0",
        ("ff.linear_in", "ff.linear_out"),
    ),
)
"""Text, then image: the order in which attention joins them."""
SINGLE_IN, SINGLE_OUT, SINGLE_NORMS = "attn.to_qkv_mlp_proj", "attn.to_out", ("attn.norm_q", "attn.norm_k")


@dataclass(frozen=True, slots=True)
class Block:
    """One block about to run: its tensors, its adapters, its sizes."""

    weights: Weights
    adapters: Adapters
    sizes: Sizes

    def layer(self, name: str) -> Linear:
        """One of its linears with what is attached to it."""
        return self.weights[name], self.adapters.get(name, ())

    def norms(self, names: tuple[str, str]) -> Norms:
        """The weights of its q and k norms under these names; they are never quantized."""
        query, key = (self.weights[name] for name in names)
        return cast(mx.array, query), cast(mx.array, key)


@dataclass(frozen=True, slots=True)
class KeptDouble:
    """What the backward pass of a double block starts from; computed again where it was not kept. Text, then image."""

    wide: list[mx.array]  # q, k, v side by side
    middle: list[mx.array]  # the streams after attention
    up: list[mx.array]  # gate, up side by side; empty where they are to be computed when they are needed


def double_forward(
    run: Run, block: Block, streams: Sequence[mx.array], modulation: Sequence[Modulations], rotary: Rotary
) -> tuple[list[mx.array], KeptDouble]:
    """Text [B, T, D] and image [B, L, D] through a double block -> the same, and what can be kept."""
    kept = double_attend(run, block, streams, modulation, rotary)
    after = []
    for place, names in enumerate(STREAMS):
        up = double_up(run, block, kept.middle, modulation, place)
        kept.up.append(up)
        gate, layer = modulation[place][5], block.layer(names.mlp[1])
        after.append(run(leave, kept.middle[place], gate, [run(gated, up)], layer))
    return after, kept


def double_attend(
    run: Run, block: Block, streams: Sequence[mx.array], modulation: Sequence[Modulations], rotary: Rotary
) -> KeptDouble:
    """A double block up to its MLPs."""
    both = list(zip(STREAMS, streams, modulation, strict=True))
    wide = [run(enter, x, m[:2], [block.layer(n) for n in names.qkv], block.sizes.eps) for names, x, m in both]
    outs = run(double_middle, wide, [block.norms(names.norms) for names in STREAMS], rotary, block.sizes)
    middle = [run(leave, x, m[2], [o], block.layer(names.out)) for (names, x, m), o in zip(both, outs, strict=True)]
    return KeptDouble(wide, middle, [])


def double_up(
    run: Run, block: Block, middle: Sequence[mx.array], modulation: Sequence[Modulations], place: int
) -> mx.array:
    """The wide product of one stream's MLP."""
    layer = block.layer(STREAMS[place].mlp[0])
    return run(enter, middle[place], modulation[place][3:5], [layer], block.sizes.eps)


def single_forward(
    run: Run, block: Block, hidden: mx.array, modulation: Modulations, rotary: Rotary
) -> tuple[mx.array, mx.array]:
    """Text and image in one stream [B, T + L, D] through a single block -> the stream, and its fused projection."""
    wide = single_start(run, block, hidden, modulation)
    inner = run(single_middle, wide, block.norms(SINGLE_NORMS), rotary, block.sizes)
    return run(leave, hidden, modulation[2], inner, block.layer(SINGLE_OUT)), wide


def single_start(run: Run, block: Block, hidden: mx.array, modulation: Modulations) -> mx.array:
    """The fused projection of a single block, all that its backward pass needs: q, k, v, gate, up side by side."""
    return run(enter, hidden, modulation[:2], [block.layer(SINGLE_IN)], block.sizes.eps)
