"""Ranks: processes that train one adapter together, on MLX's own distributed backends.

Every rank holds the whole model and the whole adapter and reads the same set. Of the passes of a step, numbered through
all ranks, rank r makes r, r + size, …; gradients are averaged and every rank makes the same update. So `size` ranks do
what one process does that accumulates `size` times as often. A group of one communicates with nobody and changes
nothing.

All that is exchanged is a sum of flat pieces: every backend has that, and it has no other operation in common with all.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import numpy as np

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages.weights import listing

Arrays = dict[str, mx.array]

_PIECE = 1 << 25  # bytes that are summed at once; the copy that this takes is the price of few, large messages
_WORDS = 2  # 32-bit words of a fact's digest
_TOLD = 100  # characters of a fact that is told in full


class RankLost(RelayError):
    """Another rank is gone; what this one has learned up to the step before is whole."""


@dataclass(slots=True)
class Waits:
    """How long a rank has waited for the others."""

    since: float | None = None
    """Of `time.monotonic`: since when it has been waiting; None while it is not."""
    seconds: float = 0.0
    """All in all, the exchange itself included."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that train together, as one of them sees them; without arguments, a process alone."""

    rank: int = 0
    size: int = 1
    link: mx.distributed.Group | None = None
    waits: Waits = field(default_factory=Waits)

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes: metrics, checkpoints, previews, the adapter."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which of a step's passes are this rank's."""
        return slice(self.rank, None, self.size)

    def average(self, loss: mx.array, gradients: Arrays) -> tuple[mx.array, Arrays]:
        """Loss and gradients (all float32) averaged over the ranks; evaluated."""
        if self.is_alone:
            return loss, gradients
        total, *sums = self._sums([loss, *gradients.values()])
        means = [value / self.size for value in (total, *sums)]
        mx.eval(means)
        return means[0], dict(zip(gradients, means[1:], strict=True))

    def any(self, is_so: bool) -> bool:
        """Whether it is so at any rank."""
        return is_so if self.is_alone else bool(self._sums([mx.array([int(is_so)], mx.uint32)])[0].item())

    def follow(self, values: Mapping[str, mx.array]) -> Arrays:
        """The first rank's values, to the bit; all ranks' have the same names, shapes and types (of 32 or 64 bits)."""
        if self.is_alone:
            return dict(values)
        words = [value.reshape(-1).view(mx.uint32) for value in values.values()]
        sums = self._sums([word if self.is_first else mx.zeros_like(word) for word in words])
        found = zip(values.items(), sums, strict=True)
        return {name: word.view(value.dtype).reshape(value.shape) for (name, value), word in found}

    def check(self, facts: Mapping[str, str]) -> None:
        """Refuse to go on where a fact of another rank differs from the first one's; InputError, at every rank.

        `facts`: what it is about -> anything that decides it; the same names in the same order at every rank.
        """
        if self.is_alone:
            return
        own = [word for fact in facts.values() for word in _digest(fact)]
        table = [own if rank == self.rank else [0] * len(own) for rank in range(self.size)]
        (found,) = self._sums([mx.array(table, mx.uint32)])
        if faults := differing(np.array(found).reshape(self.size, len(facts), _WORDS), facts):
            raise InputError(listing("the ranks were not started alike, and cannot train one adapter:", faults))

    def _sums(self, values: Sequence[mx.array]) -> list[mx.array]:
        """The sum over the ranks of each of these arrays of one type; evaluated.

        Each piece is evaluated before it is sent and after it has come: what waits for a slow rank must be no command
        of a GPU, which its system would stop after some seconds. The backend chooses the stream: the CPU's for all but
        NCCL.
        """
        mx.eval(values)
        sums: list[mx.array] = []
        with self._waiting():
            for piece in _pieces(values):
                flat = mx.concatenate([value.reshape(-1) for value in piece])
                mx.eval(flat)
                total = mx.distributed.all_sum(flat, group=self.link)
                mx.eval(total)
                ends = list(accumulate(value.size for value in piece))
                parts = mx.split(total, ends[:-1])
                sums += [part.reshape(value.shape) for part, value in zip(parts, piece, strict=True)]
                mx.eval(sums)
        return sums

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time of the block; RankLost where another rank went in it.

        Then `since` stays: a process may still hang in a backend that waits for the lost one.
        """
        self.waits.since = started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} lost another rank ({str(error).strip()}), so all of them end"
            ) from error
        self.waits.since = None
        self.waits.seconds += time.monotonic() - started


ALONE = Group()


def _pieces(values: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """The values in order, as many together as make a piece."""
    piece, size = [], 0
    for value in values:
        piece.append(value)
        size += value.nbytes
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _digest(fact: str) -> list[int]:
    digest = hashlib.sha256(fact.encode()).digest()
    return [int.from_bytes(digest[4 * n : 4 * n + 4], "big") for n in range(_WORDS)]


def differing(rows: np.ndarray, facts: Mapping[str, str]) -> list[str]:
    """A line for each fact in which a rank differs from the first one.

    rows [ranks, facts, words] of digests; `facts` are this rank's own.
    """
    faults = []
    for place, (name, here) in enumerate(facts.items()):
        others = [str(rank) for rank in range(len(rows)) if (rows[rank, place] != rows[0, place]).any()]
        if others:
            told = f" (here: {here})" if len(here) <= _TOLD else ""
            faults.append(f"{name} of rank {' and '.join(others)} is another than that of rank 0{told}")
    return faults


def open_group(waits: Waits) -> Group:
    """The group that this process was started in, by `mlx.launch` or by MPI; alone if by neither.

    RelayError where the others cannot be reached. `waits` becomes the group's; here it is waited for the others, too.
    """
    backend = launched_with(os.environ)
    if backend is None:
        return ALONE
    waits.since = time.monotonic()
    try:
        link = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise RelayError(
            f"this process was started as one of several ranks over {backend}, and cannot reach the others "
            f"({str(error).strip()}); see that all of them run, and that their addresses and ports are right and free"
        ) from error
    waits.since = None
    return Group(link.rank(), link.size(), link, waits)


def launched_with(environment: Mapping[str, str]) -> str | None:
    """The backend that the variables which launchers set stand for; None where one process was started."""
    if "MLX_RANK" in environment and _is_filled(environment.get("MLX_HOSTFILE")):
        return "ring"
    if "MLX_RANK" in environment and _is_filled(environment.get("MLX_IBV_DEVICES")):
        return "jaccl"
    if "NCCL_HOST_IP" in environment and _is_several(environment.get("MLX_WORLD_SIZE")):
        return "nccl"
    if any(_is_several(environment.get(name)) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        return "mpi"
    return None


def _is_filled(path: str | None) -> bool:
    """Whether a file of addresses holds any: `mlx.launch` writes an empty one for a rank alone."""
    return path is not None and bool(Path(path).read_text("utf-8").strip())


def _is_several(count: str | None) -> bool:
    return count is not None and count.isdigit() and int(count) > 1
