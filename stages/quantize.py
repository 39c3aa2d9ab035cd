"""A weight matrix as it stands in memory: dense, or quantized and made dense at each use.

Made dense, then multiplied, in both directions: on M5 and on CUDA the backward product of MLX's quantized kernel is
the slow one. Bits and group size are recovered from the shapes, so a weight is a plain tree of arrays that compiled
functions take as an argument.
"""

import math
from collections.abc import Iterable

import mlx.core as mx

from flux2_relay.stages import kernels
from flux2_relay.stages.packed import MICROSCALED

Weight = mx.array | tuple[mx.array, ...]
"""A dense matrix [out, in], or (packed, scales, biases) of `mx.quantize`, mode affine; other modes have no biases."""

QUANTIZED_BITS = (8, 6, 4)
_GROUPS = (64, 32)


def pack(weight: mx.array, bits: int) -> Weight:
    """`weight` [out, in] as it is kept at `bits`: 32 float32, 16 bfloat16, else affine groups along `in`.

    A matrix whose width divides by no group size stays bfloat16.
    """
    if bits == 32:
        return weight.astype(mx.float32)
    group = next((size for size in _GROUPS if weight.shape[-1] % size == 0), None)
    if bits == 16 or group is None:
        return weight.astype(mx.bfloat16)
    packed, scales, biases = mx.quantize(weight.astype(mx.bfloat16), group_size=group, bits=bits)
    return packed, scales, biases


def packed_bytes(shapes: Iterable[tuple[int, ...]], bits: int) -> int:
    """What tensors of these shapes take at `bits`; vectors (norms) stay as they are stored."""
    return sum(_packed_bytes(shape, bits) for shape in shapes)


def _packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    size = math.prod(shape)
    if len(shape) < 2 or bits >= 16:
        return size * (4 if bits == 32 else 2)
    group = next((size for size in _GROUPS if shape[-1] % size == 0), None)
    return size * 2 if group is None else size * bits // 8 + size // group * 4


def dense(weight: Weight, columns: int, dtype: mx.Dtype) -> mx.array:
    """The matrix [out, columns] that `weight` stands for, in `dtype`."""
    if isinstance(weight, mx.array):
        return weight.astype(dtype)
    packed, scales, *biases = weight
    bits, group = 32 * packed.shape[-1] // columns, columns // scales.shape[-1]
    if biases and scales.dtype == dtype:
        return kernels.unpack(packed, scales, *biases, group=group, bits=bits)
    mode = "affine" if biases else MICROSCALED[bits, group]
    return mx.dequantize(packed, scales, *biases, group_size=group, bits=bits, mode=mode, dtype=dtype)


def product(x: mx.array, weight: Weight) -> mx.array:
    """x [..., in] times the transpose of weight [out, in] -> [..., out], in x's dtype."""
    return x @ dense(weight, x.shape[-1], x.dtype).T
