"""What sigma and positions become before any weight touches them: time features and rotary tables, on the host.

Both decide the last digits of the result, so they are formed in NumPy with the precision that torch gives them.
Source: diffusers `get_timestep_embedding` and `Flux2PosEmbed`.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from flux2_relay.stages.spec import TransformerSpec

Rotary = tuple[mx.array, mx.array]
"""cos and sin [T + L, d/2] float32."""

_HALF, _ROUNDED_UP = 128, [12, 106]
"""Of FLUX.2's 128 frequencies, the two that torch's float32 exp gives one ulp higher than the exact value rounded.

At time 4000 that ulp is 1e-4 of phase: without it the velocity is 5e-6 from the reference, with it 5e-7.
"""


def time_features(time: np.ndarray, channels: int) -> np.ndarray:
    """[cos, sin] features of time [B] (already times 1000) -> [B, channels] float32, cosines first.

    The frequencies are multiplied by up to 4000: exponent in float32, exp in float64, rounded to float32 as torch has
    it. (`mx.exp` on the CPU is off by up to 8 ulp.) Phases float32, cos and sin float64.
    """
    half = channels // 2
    exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    if half == _HALF:
        frequencies[_ROUNDED_UP] = np.nextafter(frequencies[_ROUNDED_UP], np.float32(2))
    phase = (time.astype(np.float32)[:, None] * frequencies[None]).astype(np.float64)
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=-1).astype(np.float32)


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
