"""The door to kernels of our own: what stands behind it equals the portable form."""

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.stages import kernels, memory
from flux2_relay.stages.train import blocks


@pytest.mark.parametrize("rows", [100, 129])
def test_padded_attention_and_its_gradients_are_those_of_attention(rows: int) -> None:
    qkv = [mx.random.normal((2, 3, rows, 16), key=mx.random.key(n)) for n in range(3)]
    cotangent = mx.random.normal((2, 3, rows, 16), key=mx.random.key(3))

    def pulled(attend) -> list[np.ndarray]:
        out, gradients = mx.vjp(lambda *x: [attend(*x)], qkv, [cotangent])
        return [np.array(x) for x in (*out, *gradients)]

    padded = pulled(lambda *x: kernels.padded_attention(*x, lacking=-rows % kernels.TILE))
    for found, expected in zip(padded, pulled(kernels.attention), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_card_pads_attention_and_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernels, "padded_attention", lambda *x: asked.append(x[-1]) or x[0])
    x = mx.zeros((1, 1, 100, 8))
    kernels.attention(x, x, x)
    monkeypatch.setattr(memory, "is_cuda", lambda: True)
    kernels.attention(x, x, x)
    monkeypatch.setattr(kernels, "portable", True)
    kernels.attention(x, x, x)
    assert asked == [28]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_swapping_pairs_by_a_product_is_exact(dtype: mx.Dtype) -> None:
    x = mx.random.normal((5, 64)).astype(dtype)
    assert mx.array_equal(blocks.swapped(x), blocks.swapped(x.astype(mx.float32)).astype(dtype))


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 64), (8, 32), (6, 64)])
def test_unpacking_is_mlx_dequantize_where_there_is_no_card(bits: int, group: int) -> None:
    packed = mx.quantize(mx.random.normal((64, 512)).astype(mx.bfloat16), group_size=group, bits=bits)
    expected = mx.dequantize(*packed, group_size=group, bits=bits)
    assert mx.array_equal(kernels.unpack(*packed, group=group, bits=bits), expected)
