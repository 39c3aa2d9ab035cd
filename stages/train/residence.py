"""Where the weights of the blocks are: all in memory, or some of them read from disk each time they are needed.

A pass goes through the blocks forward and then backward, so what comes next is always known: whoever runs a pass
announces its order, and threads read ahead of it. The block at a turn is needed twice in a row and read once.
Resident blocks stand evenly between streamed ones, so that the readers always have a next one to fetch.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from flux2_relay.stages.quantize import Weight

BlockWeights = Mapping[str, Weight]
Reader = Callable[[int], BlockWeights]
"""Reads the weights of block n, evaluated."""


class Residence(Protocol):
    """Hands out the weights of blocks by their place among all blocks."""

    def announce(self, order: Sequence[int]) -> None:
        """Say in which order the blocks of a pass will be asked for."""
        ...

    def weights(self, place: int) -> BlockWeights:
        """The weights of one block; waits where they are still being read."""
        ...

    def close(self) -> None:
        """Stop reading ahead; no weights are asked for any more."""
        ...


class Resident:
    """All blocks in memory."""

    def __init__(self, blocks: int, read: Reader) -> None:
        """Read every block now."""
        self._weights = [read(place) for place in range(blocks)]

    def announce(self, order: Sequence[int]) -> None:
        """Nothing to prepare."""

    def weights(self, place: int) -> BlockWeights:
        """The weights of one block."""
        return self._weights[place]

    def close(self) -> None:
        """Nothing is being read."""


class Streamed:
    """`resident` of the blocks in memory, the others read `ahead` of their use by as many threads."""

    def __init__(self, blocks: int, read: Reader, resident: int = 0, ahead: int = 1) -> None:
        """Read the resident blocks now."""
        self._read, self._ahead = read, ahead
        self._held = {place: read(place) for place in resident_places(blocks, resident)}
        self._pool = ThreadPoolExecutor(ahead, thread_name_prefix="blocks")
        self._order: deque[int] = deque()
        self._coming: deque[tuple[int, Future[BlockWeights]]] = deque()
        self._last: tuple[int, BlockWeights] | None = None

    def announce(self, order: Sequence[int]) -> None:
        """Go on reading in this order; what was read ahead for the pass before is used where it fits."""
        self._order.clear()
        before = self._last[0] if self._last else None
        for place in order:
            if place not in self._held and place != before:
                self._order.append(place)
            before = place if place not in self._held else before
        for place, _ in list(self._coming):
            if self._order and self._order[0] == place:
                self._order.popleft()
            else:
                self._drop()
                break
        self._fill()

    def weights(self, place: int) -> BlockWeights:
        """The weights of one block; the one handed out before may be let go of."""
        if place in self._held:
            return self._held[place]
        if self._last is None or self._last[0] != place:
            self._last = None
            self._last = (place, self._next(place))
        return self._last[1]

    def close(self) -> None:
        """Let the reads under way end; a process must not leave while a thread computes."""
        self._drop()
        self._pool.shutdown()

    def _next(self, place: int) -> BlockWeights:
        if not self._coming or self._coming[0][0] != place:  # not what was announced
            self._drop()
            return self._read(place)
        _, future = self._coming.popleft()
        value = future.result()
        self._fill()
        return value

    def _fill(self) -> None:
        while self._order and len(self._coming) < self._ahead:
            place = self._order.popleft()
            self._coming.append((place, self._pool.submit(self._read, place)))

    def _drop(self) -> None:
        for _, future in self._coming:
            future.cancel()
        self._coming.clear()


def resident_places(blocks: int, resident: int) -> list[int]:
    """Which of `blocks` stay in memory, spread evenly."""
    return [place for place in range(blocks) if (place + 1) * resident // blocks > place * resident // blocks]
