"""Passes through the blocks taken in turns: several go through one block before any of them goes on to the next.

A way is a generator: it yields a number before each block that it is about to enter and returns what it found. The
numbers rise along a way and mean the same block on every way over one transformer, so whoever walks several of them
has each block's weights fetched once for all.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

Result = TypeVar("Result")
Way = Generator[int, None, Result]


def alone(way: Way[Result]) -> Result:
    """Walk one way to its end -> what it returns."""
    while True:
        try:
            next(way)
        except StopIteration as end:
            return end.value


def together(ways: Sequence[Way[Result]]) -> list[Result]:
    """Walk all ways, those that are furthest behind first -> what each returns, in the order of `ways`."""
    ahead: dict[int, int] = {}
    results: dict[int, Result] = {}
    going = list(range(len(ways)))
    while going:
        for number in going:
            try:
                ahead[number] = next(ways[number])
            except StopIteration as end:
                results[number] = end.value
                ahead.pop(number, None)
        nearest = min(ahead.values(), default=0)
        going = [number for number, turn in ahead.items() if turn == nearest]
    return [results[number] for number in range(len(ways))]


def shifted(way: Way[Result], by: int) -> Way[Result]:
    """The same way with `by` added to its numbers: one that follows others."""
    while True:
        try:
            turn = next(way)
        except StopIteration as end:
            return end.value
        yield by + turn
