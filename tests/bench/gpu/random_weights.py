"""Random weights behind the product's own reader: made when they are read, tensor by tensor, on the device.

Nothing else stands in memory, so a checkpoint of 64 GB is loaded in seconds and takes no byte more than it would from
disk. Uniform within 1/sqrt(in), as torch initialises a linear: activations stay near one through all blocks.
"""

import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from flux2_relay.stages.weights import TensorInfo


@dataclass(frozen=True, slots=True)
class RandomTensors:
    """What a `Tensors` is to its readers, for any shapes; a value depends on (seed, name) alone."""

    shapes: Mapping[str, tuple[int, ...]]
    seed: int = 0
    source: Path = Path("random")
    on_disk: Mapping[str, TensorInfo] = field(default_factory=dict)
    """What lies in a file after all, for readers that gather rows from one."""

    @property
    def info(self) -> dict[str, TensorInfo]:
        """A table as a file in bfloat16 would have it; there is none, but of what is `on_disk`."""
        return {
            name: TensorInfo(self.source, name, "BF16", shape, 0, 2 * math.prod(shape))
            for name, shape in self.shapes.items()
        } | dict(self.on_disk)

    def read(self, name: str, dtype: mx.Dtype | None = None) -> mx.array:
        """One tensor, lazy; norms are around one."""
        shape = self.shapes[name]
        key, wanted = mx.random.key((self.seed << 32) | zlib.crc32(name.encode())), dtype or mx.bfloat16
        if len(shape) == 1:
            return mx.random.uniform(0.8, 1.2, shape, key=key, dtype=mx.float32).astype(wanted)
        bound = 1 / math.sqrt(shape[-1])
        return mx.random.uniform(-bound, bound, shape, key=key, dtype=mx.bfloat16).astype(wanted)

    def read_all(self, names: Iterable[str], dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """Several tensors, lazy."""
        return {name: self.read(name, dtype) for name in names}


def name_as_identity(tensors: object, names: Iterable[str], config: Mapping[str, object]) -> str:
    """Stands for `identity.weights_identity`: random weights have no bytes on disk to hash, their names tell them."""
    return hashlib.sha256(repr((sorted(names), sorted(config.items()))).encode()).hexdigest()
