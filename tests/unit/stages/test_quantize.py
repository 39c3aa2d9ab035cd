"""Weights at every width, packed and dense again."""

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.stages.quantize import dense, pack, packed_bytes, product


def matrix(rows: int, columns: int) -> mx.array:
    return mx.random.normal((rows, columns), key=mx.random.key(columns))


@pytest.mark.parametrize(("bits", "dtype"), [(32, mx.float32), (16, mx.bfloat16)])
def test_unquantized_weights_are_only_cast(bits: int, dtype: mx.Dtype) -> None:
    weight = matrix(6, 50)
    packed = pack(weight, bits)
    assert isinstance(packed, mx.array)
    assert packed.dtype == dtype
    assert mx.array_equal(dense(packed, 50, mx.float32), weight.astype(dtype).astype(mx.float32))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize(("columns", "group"), [(128, 64), (192, 64), (96, 32), (32, 32)])
def test_quantized_weights_come_back_within_half_a_step(bits: int, columns: int, group: int) -> None:
    weight = matrix(6, columns)
    packed = pack(weight, bits)
    assert isinstance(packed, tuple)
    assert packed[1].shape == (6, columns // group)
    back = dense(packed, columns, mx.float32)
    assert back.shape == weight.shape
    assert back.dtype == mx.float32
    groups = np.array(weight).reshape(6, -1, group)
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    error = np.abs(np.array(back).reshape(groups.shape) - groups).max(-1)
    # Scales are bfloat16 too, and MLX lets zero be exact: a step more for the ends of the range.
    assert (error < 1.5 * step + 0.02).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_width_that_no_group_divides_stays_bfloat16(bits: int) -> None:
    packed = pack(matrix(6, 48), bits)
    assert isinstance(packed, mx.array)
    assert packed.dtype == mx.bfloat16


def test_fewer_bits_are_coarser() -> None:
    weight = matrix(16, 128)
    errors = [float(mx.abs(dense(pack(weight, bits), 128, mx.float32) - weight).mean()) for bits in (32, 16, 8, 6, 4)]
    assert errors == sorted(errors)
    assert errors[0] == 0
    assert errors[-1] > 10 * errors[1] > 0


@pytest.mark.parametrize("bits", [32, 16, 8, 6, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_product_is_that_of_the_dense_matrix_in_the_type_of_the_input(bits: int, dtype: mx.Dtype) -> None:
    packed = pack(matrix(6, 64), bits)
    x = mx.random.normal((2, 3, 64), key=mx.random.key(1)).astype(dtype)
    y = product(x, packed)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 6)
    assert mx.array_equal(y, x @ dense(packed, 64, dtype).T)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_packed_weights_take_their_bits_and_the_scales_of_a_bfloat16_base(bits: int) -> None:
    weight = mx.random.normal((4, 128), key=mx.random.key(0))
    packed = pack(weight, bits)
    assert isinstance(packed, tuple)
    assert 32 * packed[0].shape[-1] == bits * 128
    assert [part.dtype for part in packed[1:]] == [mx.bfloat16, mx.bfloat16]
    assert sum(part.nbytes for part in packed) == packed_bytes([weight.shape], bits)
