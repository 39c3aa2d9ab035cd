"""Randomness as a function of what it is for: no state, no order, so a resumed run draws what the unbroken one drew."""

import hashlib

import mlx.core as mx


def number(*parts: int | str) -> int:
    """A 64-bit number that depends on every part, e.g. (seed, "noise", step, item)."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def key(*parts: int | str) -> mx.array:
    """MLX's random key for these parts."""
    return mx.random.key(number(*parts))


def uniform(*parts: int | str) -> float:
    """A number strictly between 0 and 1 for these parts, the same on every machine."""
    # 52 bits and a half are all that a float holds: with more, the largest numbers would round to 1.
    return ((number(*parts) >> 12) + 0.5) / 2**52


def shuffled(count: int, *parts: int | str) -> list[int]:
    """The numbers 0 … count - 1 in an order that these parts decide."""
    return sorted(range(count), key=lambda index: number(*parts, index))
