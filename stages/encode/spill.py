"""Hidden states of a pass in a file between the layers, where memory would hold too few captions at once.

A streamed encoder reads every layer once a pass. Rows that wait for the next layer lie in one nameless file, which the
system deletes whatever becomes of the process; they come back bit for bit, one group ahead of its use.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flux2_relay.cache.durable import memory_folder
from flux2_relay.cache.errors import RelayError

if TYPE_CHECKING:
    from flux2_relay.stages.encode.sequences import CaptionRows, Rows

_SHARE = 0.5  # of what is free on the disk


def folder() -> Path:
    """Where the file lies: the user's folder for what can be made again."""
    return memory_folder()


def room_bytes() -> int:
    """How large the file may become."""
    place = folder()
    while not place.exists():
        place = place.parent
    return int(_SHARE * shutil.disk_usage(place).free)


@dataclass(slots=True)
class _Place:
    """Where a group lies in the file: its rows, and behind them each of its taps."""

    start: int
    shape: tuple[int, ...]
    dtype: mx.Dtype
    taps: int = 0

    @property
    def bytes(self) -> int:
        """Of the rows, as of each tap."""
        return prod(self.shape) * self.dtype.size


class Spill:
    """The file of one pass, and the thread that reads and writes it in the order in which it is told."""

    def __init__(self, where: Path) -> None:
        """Make the file in this folder."""
        where.mkdir(parents=True, exist_ok=True)
        self._where, self._file = where, tempfile.TemporaryFile(dir=where, buffering=0)  # noqa: SIM115
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="spill")
        self._places: dict[Rows, _Place] = {}
        self._end = 0
        self._writing: Future[None] | None = None

    def put(self, rows: "CaptionRows", taps: int) -> None:
        """Take in a new group before its first layer, with room for its taps."""
        self._places[rows] = place = _Place(self._end, rows.hidden.shape, rows.hidden.dtype)
        self._end += place.bytes * (1 + taps)
        self._store(rows, place)

    def each(self, running: "Sequence[Rows]") -> "Iterator[Rows]":
        """Each of them in turn, groups in memory only while they are looked at, the next one read meanwhile."""
        ahead: Future[np.ndarray] | None = None
        for rows, following in zip(running, [*running[1:], None], strict=True):
            place = self._places.get(rows)
            if place is not None:
                rows.hidden = _rows(place, ahead or self._read(place, 0))
            next_place = self._places.get(following) if following else None
            ahead = self._read(next_place, 0) if next_place else None
            yield rows
            if place is not None:
                self._store(rows, place)

    def fetch_taps(self, rows: "CaptionRows") -> None:
        """Bring the taps of a group back into memory; the group is then forgotten."""
        place = self._places.pop(rows)
        self._written()
        rows.taps = [_rows(place, self._read(place, tap)) for tap in range(1, 1 + place.taps)]

    def __enter__(self) -> "Spill":
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the room back."""
        self._pool.shutdown()
        self._file.close()

    def _store(self, rows: "Rows", place: _Place) -> None:
        """Write a group's rows, once more as a tap where they have just become one, and let go of them."""
        slots = [0]
        if rows.taps:
            place.taps += 1
            slots.append(place.taps)
        self._written()  # one at a time: what waits to be written is in memory, too
        self._writing = self._pool.submit(self._write, _bits(rows.hidden), place, slots)
        rows.hidden, rows.taps = mx.zeros(0), []

    def _written(self) -> None:
        """Wait for what is being written; raise what went wrong."""
        if self._writing is not None:
            self._writing.result()

    def _write(self, bits: np.ndarray, place: _Place, slots: Sequence[int]) -> None:
        for slot in slots:
            rest, at = bits.data.cast("B"), place.start + slot * place.bytes
            while rest:
                try:
                    written = os.pwrite(self._file.fileno(), rest, at)
                except OSError as error:
                    said = f"{self._where}: hidden states cannot be written there ({error.strerror})"
                    raise RelayError(f"{said}; make room, or set `encode.stream: never`") from None
                rest, at = rest[written:], at + written

    def _read(self, place: _Place, slot: int) -> Future[np.ndarray]:
        return self._pool.submit(self._read_now, place, slot)

    def _read_now(self, place: _Place, slot: int) -> np.ndarray:
        data = bytearray(place.bytes)
        rest, at = memoryview(data), place.start + slot * place.bytes
        while rest:
            count = os.preadv(self._file.fileno(), [rest], at)
            if count == 0:
                raise RelayError(f"{self._where}: hidden states that were written there are gone")
            rest, at = rest[count:], at + count
        return np.frombuffer(data, np.uint16 if place.dtype == mx.bfloat16 else np.float32).reshape(place.shape)


def _rows(place: _Place, read: Future[np.ndarray]) -> mx.array:
    return mx.array(read.result()).view(place.dtype)


def _bits(rows: mx.array) -> np.ndarray:
    """The bytes of bfloat16 or float32 rows."""
    return np.array(rows.view(mx.uint16) if rows.dtype == mx.bfloat16 else rows)
