"""The one door to kernels of our own: what MLX does well elsewhere and slowly on a card, and the form it falls back to.

Each stands beside the portable form that it must equal. It is used on the backend that it was tested on and nowhere
else; `portable` has the portable forms everywhere, for comparison.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx

from flux2_relay.stages import memory

portable = False
"""Set to use no kernel of our own on any backend."""

_THREADS, _EACH = 256, 8  # threads of a block; values that one of them makes

_UNPACK = """
    const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    constexpr int WORDS = BITS / 4, IN_WORD = 32 / BITS;
    const float scale = static_cast<float>(scales[at / (GROUP / 8)]);
    const float bias = static_cast<float>(biases[at / (GROUP / 8)]);
    alignas(16) T values[8];
    for (int word = 0; word < WORDS; ++word) {
        const uint32_t bits = packed[at * WORDS + word];
        for (int j = 0; j < IN_WORD; ++j) {
            const uint32_t value = (bits >> (BITS * j)) & ((1u << BITS) - 1u);
            values[word * IN_WORD + j] = static_cast<T>(scale * static_cast<float>(value) + bias);
        }
    }
    reinterpret_cast<uint4*>(dense)[at] = *reinterpret_cast<const uint4*>(values);
"""
"""A thread makes eight values of one group and writes them as 16 bytes."""


def unpack(packed: mx.array, scales: mx.array, biases: mx.array, group: int, bits: int) -> mx.array:
    """The matrix [out, in] of an affine-quantized one, in the type of its scales: `mx.dequantize` bit for bit.

    On CUDA MLX's own takes three times as long as the memory it moves would need.
    """
    rows, columns = scales.shape[0], scales.shape[1] * group
    threads = rows * columns // _EACH
    if portable or not memory.is_cuda() or bits not in (4, 8) or scales.itemsize != 2 or threads % _THREADS:
        return mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
    (dense,) = _unpack_kernel()(
        inputs=[packed, scales, biases],
        template=[("T", scales.dtype), ("BITS", bits), ("GROUP", group)],
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows, columns)],
        output_dtypes=[scales.dtype],
    )
    return dense


@lru_cache(maxsize=1)
def _unpack_kernel() -> Any:  # noqa: ANN401 - MLX gives it no type
    return mx.fast.cuda_kernel(
        name="unpack", input_names=["packed", "scales", "biases"], output_names=["dense"], source=_UNPACK
    )


_NEVER = -30000.0  # added to a score: its exponential is zero, and float16 can hold it
TILE = 128
"""Rows that cuDNN's backward of attention wants a multiple of; without, MLX forms all scores."""


def attention(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
    """Every row looks at every row; [B, N, rows, d] three times -> [B, N, rows, d]."""
    lacking = -query.shape[2] % TILE
    if lacking and not portable and memory.is_cuda():
        return padded_attention(query, key, value, lacking)
    return mx.fast.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5)


def padded_attention(query: mx.array, key: mx.array, value: mx.array, lacking: int) -> mx.array:
    """The same with `lacking` rows of zeros behind the others, which nobody looks at."""
    rows = query.shape[2]
    query, key, value = (mx.pad(x, [(0, 0), (0, 0), (0, lacking), (0, 0)]) for x in (query, key, value))
    unseen = mx.where(mx.arange(rows + lacking) < rows, 0.0, _NEVER).astype(query.dtype)
    mask = mx.broadcast_to(unseen, (1, 1, rows + lacking, rows + lacking))
    out = mx.fast.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5, mask=mask)
    return mx.split(out, [rows], axis=2)[0]
