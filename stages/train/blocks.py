"""The two kinds of block, and everything around them, as pure functions of arrays.

Weights and adapters are arguments, never captured: one compiled function serves every block of a kind, resident or
streamed, and gradients cannot be lost to a closure. Names inside a block are diffusers' own.

Letters: B batch, L image tokens, T text tokens, D hidden, N heads, d head dim, M MLP width.
Source: diffusers `Flux2Transformer2DModel`; gates are raw, scales enter as 1 + scale, attention has no mask.
"""

from collections.abc import Mapping
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux2_relay.stages.quantize import Weight, product
from flux2_relay.stages.spec import TransformerSpec

Weights = Mapping[str, Weight]
"""The weights of one block (or of the parts outside the blocks) by name."""
Adapters = Mapping[str, tuple[mx.array, mx.array, mx.array]]
"""Linear's name -> (A [r, in], B [out, r], scale []), float32; absent where a linear has no adapter."""
Rotary = tuple[mx.array, mx.array]
"""cos and sin [T + L, d/2] float32."""


def linear(x: mx.array, name: str, weights: Weights, adapters: Adapters) -> mx.array:
    """x [..., in] -> [..., out]: the base product plus scale * B(Ax) where `name` has an adapter."""
    y = product(x, weights[name])
    if name not in adapters:
        return y
    a, b, scale = adapters[name]
    low = x @ a.astype(x.dtype).T
    return y + (low @ b.astype(x.dtype).T) * scale.astype(x.dtype)


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Layer norm without affine, then (1 + scale) x + shift; x [B, L, D], shift and scale [B, 1, D]."""
    return (1 + scale) * mx.fast.layer_norm(x, None, None, eps) + shift


def gated(x: mx.array) -> mx.array:
    """silu(gate) * up of [..., 2M] -> [..., M], gate first."""
    gate, up = mx.split(x, 2, axis=-1)
    return nn.silu(gate) * up


def to_heads(x: mx.array, heads: int) -> mx.array:
    """[B, L, N*d] -> [B, N, L, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def from_heads(x: mx.array) -> mx.array:
    """[B, N, L, d] -> [B, L, N*d]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def rotate(x: mx.array, rotary: Rotary) -> mx.array:
    """Turn each interleaved pair (2j, 2j+1) of x [B, N, L, d] by its angle, in float32, back in x's dtype."""
    cos, sin = (table[:, :, None] for table in rotary)
    first, second = mx.split(x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2), 2, axis=-1)
    turned = mx.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def attend(query: mx.array, key: mx.array, value: mx.array, rotary: Rotary) -> mx.array:
    """Attention of every row to every row; q, k, v [B, N, T + L, d] -> [B, T + L, N*d]."""
    query, key = rotate(query, rotary), rotate(key, rotary)
    out = mx.fast.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5)
    return from_heads(out)


def query_key_value(
    x: mx.array, names: tuple[str, ...], weights: Weights, adapters: Adapters, spec: TransformerSpec
) -> tuple[mx.array, mx.array, mx.array]:
    """Projections of one stream of a double block, q and k normalised: three of [B, N, L, d]."""
    to_q, to_k, to_v, norm_q, norm_k = names
    query, key, value = (to_heads(linear(x, name, weights, adapters), spec.heads) for name in (to_q, to_k, to_v))
    return rms(query, weights[norm_q], spec.eps), rms(key, weights[norm_k], spec.eps), value


def rms(x: mx.array, weight: Weight, eps: float) -> mx.array:
    """RMS norm over the head dim, float32 inside, in x's dtype."""
    assert isinstance(weight, mx.array)  # norms are never quantized
    return mx.fast.rms_norm(x, weight.astype(x.dtype), eps)


_IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k")
_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.norm_added_q", "attn.norm_added_k")


def double_block(
    weights: Weights,
    adapters: Adapters,
    streams: tuple[mx.array, mx.array],
    modulation: tuple[mx.array, mx.array],
    rotary: Rotary,
    spec: TransformerSpec,
) -> tuple[mx.array, mx.array]:
    """Image [B, L, D] and text [B, T, D], modulation [B, 6D] for each -> image and text.

    Rows are joined text first for attention; the attention and then the MLP of each stream are added through a gate.
    """
    image, text = streams
    shift_i, scale_i, gate_i, mlp_shift_i, mlp_scale_i, mlp_gate_i = mx.split(modulation[0][:, None], 6, axis=-1)
    shift_t, scale_t, gate_t, mlp_shift_t, mlp_scale_t, mlp_gate_t = mx.split(modulation[1][:, None], 6, axis=-1)
    of_image = query_key_value(modulate(image, shift_i, scale_i, spec.eps), _IMAGE, weights, adapters, spec)
    of_text = query_key_value(modulate(text, shift_t, scale_t, spec.eps), _TEXT, weights, adapters, spec)
    query, key, value = (mx.concatenate([t, i], axis=2) for t, i in zip(of_text, of_image, strict=True))
    out_text, out_image = mx.split(attend(query, key, value, rotary), [text.shape[1]], axis=1)
    image = image + gate_i * linear(out_image, "attn.to_out.0", weights, adapters)
    text = text + gate_t * linear(out_text, "attn.to_add_out", weights, adapters)
    image = image + mlp_gate_i * _mlp(modulate(image, mlp_shift_i, mlp_scale_i, spec.eps), "ff", weights, adapters)
    text = text + mlp_gate_t * _mlp(modulate(text, mlp_shift_t, mlp_scale_t, spec.eps), "ff_context", weights, adapters)
    return image, text


def _mlp(x: mx.array, name: str, weights: Weights, adapters: Adapters) -> mx.array:
    wide = linear(x, f"{name}.linear_in", weights, adapters)
    return linear(gated(wide), f"{name}.linear_out", weights, adapters)


def single_block(
    weights: Weights,
    adapters: Adapters,
    hidden: mx.array,
    modulation: mx.array,
    rotary: Rotary,
    spec: TransformerSpec,
) -> mx.array:
    """Text and image rows in one stream [B, T + L, D], modulation [B, 3D] -> the stream.

    Attention and MLP are parallel: one projection in (q, k, v, gate, up), one out (attention, MLP).
    """
    shift, scale, gate = mx.split(modulation[:, None], 3, axis=-1)
    wide = linear(modulate(hidden, shift, scale, spec.eps), "attn.to_qkv_mlp_proj", weights, adapters)
    query, key, value, mlp = mx.split(wide, [spec.hidden, 2 * spec.hidden, 3 * spec.hidden], axis=-1)
    query, key, value = (to_heads(x, spec.heads) for x in (query, key, value))
    query, key = (rms(x, weights[f"attn.norm_{n}"], spec.eps) for x, n in ((query, "q"), (key, "k")))
    out = mx.concatenate([attend(query, key, value, rotary), gated(mlp)], axis=-1)
    return hidden + gate * linear(out, "attn.to_out", weights, adapters)


def output(hidden: mx.array, modulation: mx.array, weights: Weights, eps: float) -> mx.array:
    """Image rows [B, L, D], modulation [B, 2D] (scale first) -> velocity [B, L, 128]."""
    scale, shift = mx.split(modulation[:, None], 2, axis=-1)
    return product(modulate(hidden, shift, scale, eps), weights["proj_out"])


def time_features(time: np.ndarray, channels: int) -> np.ndarray:
    """[cos, sin] features of time [B] (already times 1000) -> [B, channels] float32, cosines first.

    The frequencies decide the last digits, since time reaches 4000: exponent in float32, exp in float64, rounded to
    float32 as torch has it. (`mx.exp` on the CPU is off by up to 8 ulp.) Phases float32, cos and sin float64.
    """
    half = channels // 2
    exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    if half == _HALF:
        frequencies[_ROUNDED_UP] = np.nextafter(frequencies[_ROUNDED_UP], np.float32(2))
    phase = (time.astype(np.float32)[:, None] * frequencies[None]).astype(np.float64)
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=-1).astype(np.float32)


_HALF, _ROUNDED_UP = 128, [12, 106]
"""Of FLUX.2's 128 frequencies, the two that torch's float32 exp gives one ulp higher than the exact value rounded.

At time 4000 that ulp is 1e-4 of phase: without it the velocity is 5e-6 from the reference, with it 5e-7.
"""


def rotary_tables(ids: np.ndarray, spec: TransformerSpec) -> Rotary:
    """cos and sin [rows, d/2] float32 of position ids [rows, 4] (t, h, w, l); angles in float64."""
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    return _rotary_tables(ids.tobytes(), ids.shape, spec.rope_axes, spec.rope_theta)


@lru_cache(maxsize=32)  # one a bucket; a step must not pay for the same tables again
def _rotary_tables(ids: bytes, shape: tuple[int, ...], axes: tuple[int, ...], theta: float) -> Rotary:
    positions = np.frombuffer(ids, dtype=np.int64).reshape(shape).astype(np.float64)
    angles = np.concatenate(
        [positions[:, axis, None] * theta ** (-np.arange(0, width, 2) / width) for axis, width in enumerate(axes)],
        axis=-1,
    )
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))
