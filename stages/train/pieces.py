"""Running pieces of blocks: compiled once each, dispatched a bounded way ahead.

All that is dispatched holds its memory until it has run, so the bound is what keeps temporaries of a few pieces in
memory and not those of all blocks.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from flux2_relay.stages import memory

AHEAD = 3
"""Pieces under way at once on a GPU: with fewer it waits for the next one, with more only memory grows."""


@dataclass(slots=True)
class Pieces:
    """Calls pieces: `pieces(piece, *arguments)` starts one and gives what it returns, not yet computed."""

    ahead: int = field(default_factory=lambda: AHEAD if memory.is_gpu() else 1)
    compiles: bool = field(default_factory=memory.is_gpu)
    """On a CPU compiling calls a C++ compiler for each new kernel and makes nothing faster."""
    compiled: dict[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)
    under_way: deque[Any] = field(default_factory=deque)

    def __call__(self, piece: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - a piece takes any arrays
        """Start a piece."""
        result = self._ready(piece)(*arguments)
        mx.async_eval(result)
        self.under_way.append(result)
        if len(self.under_way) > self.ahead:
            mx.eval(self.under_way.popleft())
        return result

    def settle(self) -> None:
        """Wait for all that is under way, and let go of it."""
        mx.eval(list(self.under_way))
        self.under_way.clear()

    def _ready(self, piece: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiles:
            return piece
        if piece not in self.compiled:
            self.compiled[piece] = mx.compile(piece)
        return self.compiled[piece]
