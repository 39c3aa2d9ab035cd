"""Safetensors out, in shards with an index as diffusers has them, without a tensor whole in memory.

The header of a file holds every offset, and sizes are known beforehand: so it is written first, then the bytes as they
come. A folder is complete when its index is, which is written last.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flux2_relay.cache import durable
from flux2_relay.cache.errors import RelayError
from flux2_relay.stages.files import write_json

SHARD_BYTES = 10_000_000_000  # diffusers' own
SIZES = {"BF16": 2, "F32": 4}
"""Element types that are written, with their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """What a folder of weights will hold: shapes by name, one element type, and the largest file."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    stem: str = "diffusion_pytorch_model"
    most_bytes: int = SHARD_BYTES

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shapes[name]) * SIZES[self.dtype]

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.size, self.shapes))

    def files(self) -> dict[str, list[str]]:
        """File name -> the tensors in it, in order; a tensor larger than `most_bytes` has a file of its own."""
        groups: list[list[str]] = [[]]
        room = self.most_bytes
        for name in self.shapes:
            if groups[-1] and self.size(name) > room:
                groups.append([])
                room = self.most_bytes
            groups[-1].append(name)
            room -= self.size(name)
        if len(groups) == 1:
            return {f"{self.stem}.safetensors": groups[0]}
        return {f"{self.stem}-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}

    def write(self, folder: Path, bytes_of: Callable[[str], Iterable[bytes]]) -> None:
        """Write all files, synced; `bytes_of` gives the bytes of a tensor in pieces."""
        files = self.files()
        for file, names in files.items():
            self._write(folder / file, names, bytes_of)
        if len(files) > 1:
            index = {name: file for file, names in files.items() for name in names}
            metadata = {"total_size": self.total}
            write_json(folder / f"{self.stem}.safetensors.index.json", {"metadata": metadata, "weight_map": index})
        durable.sync_folder(folder)

    def _write(self, file: Path, names: Sequence[str], bytes_of: Callable[[str], Iterable[bytes]]) -> None:
        try:
            with open(file, "xb") as out:
                out.write(self._header(names))
                for name in names:
                    written = sum(out.write(piece) for piece in bytes_of(name))
                    if written != self.size(name):
                        raise RelayError(f"{file}: {written} bytes of {name} came, {self.size(name)} were expected")
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise RelayError(f"{file}: cannot be written ({error}); is the disk full?") from None

    def _header(self, names: Sequence[str]) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            end = at + self.size(name)
            header[name] = {"dtype": self.dtype, "shape": list(self.shapes[name]), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
        return struct.pack("<Q", len(text)) + text
