"""Arrays in pieces: cut, laid side by side, as rows of one matrix."""

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import mlx.core as mx


def split(x: mx.array, parts: int | Sequence[int], axis: int) -> list[mx.array]:
    """Cut x into equal parts or at places; its gradient is one concatenation, where slices cost a buffer each."""
    return cast(list[mx.array], mx.split(x, parts if isinstance(parts, int) else list(parts), axis=axis))


def cut(array: mx.array, like: Sequence[mx.array], axis: int) -> list[mx.array]:
    """`array` cut along `axis` where pieces with the last axes of `like` meet."""
    places = list(accumulate(piece.shape[-1] for piece in like))[:-1]
    return split(array, places, axis=axis) if places else [array]


def joined(pieces: Sequence[mx.array], axis: int) -> mx.array:
    """Pieces as one array; a single one as it is."""
    return mx.concatenate(list(pieces), axis=axis) if len(pieces) > 1 else pieces[0]


def flat(x: mx.array) -> mx.array:
    """x [..., n] as rows [-1, n]."""
    return x.reshape(-1, x.shape[-1])


def product(pieces: Sequence[mx.array], parts: Sequence[mx.array], total: mx.array | None = None) -> mx.array:
    """The sum of pieces [..., n] times their parts [n, m] of a matrix, and of `total` [..., m]."""
    for piece, part in zip(pieces, parts, strict=True):
        total = piece @ part if total is None else mx.addmm(total, piece, part)
    assert total is not None
    return total
