"""Stage one at dev's size: the product's text encoder, layer by layer over all captions, resident or from disk.

A caption is a number here, that of its tokens: the stand-in tokenizer makes as many, behind a prefix of 32.
"""

import math
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bench.gpu import models
from bench.gpu.cases import GIB
from bench.gpu.random_weights import RandomTensors

from flux2_relay.stages.encode import encoder_weights
from flux2_relay.stages.encode.layers import StreamedLayers, compute_dtype, resident_layers
from flux2_relay.stages.encode.options import EncodeOptions
from flux2_relay.stages.encode.text import TextEncoder
from flux2_relay.stages.names import EMBEDDING
from flux2_relay.stages.sizes import TextSpec
from flux2_relay.stages.weights import TensorInfo, Tensors, read_header

BITS, PREFIX, FILES = 16, 32, 3
"""Type of the weights; rows that all captions share; layers that lie on disk, each read as every third one."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a `CaptionTokenizer` is to the encoder, for captions that are numbers of tokens."""

    prefix: tuple[int, ...] = tuple(range(100, 100 + PREFIX))
    pad: int = 11
    shares_rows: bool = True

    def ids(self, caption: str) -> list[int]:
        """The prefix and as many tokens as the caption says."""
        return [*self.prefix, *(1000 + (31 * n) % 7000 for n in range(int(caption)))]

    def own(self, ids: list[int]) -> list[int]:
        """What follows the prefix."""
        return ids[PREFIX:]

    def cost(self, caption: str) -> int:
        """Tokens that go through the layers."""
        return int(caption)


def captions(count: int, mean: int) -> list[str]:
    """Lengths around `mean`, as captions have them: log-normal, from 8 to 480."""
    draw = random.Random(0)
    lengths = (int(draw.lognormvariate(math.log(mean) - 0.08, 0.4)) for _ in range(count))
    return [str(min(480, max(8, length))) for length in lengths]


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All captions, `repeats` times after a warm-up of a few; the best time, the peak of arrays."""
    spec = models.text_spec(settings.get("tiny", False))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as aside:
        encoder = _encoder(spec, Path(settings["files"] or aside), settings["streamed"])
        mx.synchronize()
        load, texts = time.perf_counter() - started, captions(settings["captions"], settings["mean"])
        mx.set_cache_limit(GIB)
        _encode(encoder, texts[:8])
        mx.reset_peak_memory()
        waits: list[float] = []
        seconds = [_encode(encoder, texts, waits) for _ in range(settings["repeats"])]
    how = "streamed" if settings["streamed"] else "resident"
    host = sum(waits) / len(seconds)
    return {
        "how": f"{spec.taps[-1]} layers, {BITS} bit, {how}, {sum(map(int, texts))} own rows, {host:.2g} s to the host",
        "load_seconds": round(load, 2),
        "seconds": round(min(seconds), 3),
        "host_seconds": round(host, 3),
        "all_seconds": [round(value, 3) for value in seconds],
        "peak_gib": round(mx.get_peak_memory() / GIB, 3),
    }


def _encode(encoder: TextEncoder, texts: list[str], waits: list[float] | None = None) -> float:
    """Seconds until all rows are on the host, where the stage puts them into the store; passes as the stage has them.

    `waits` gets the seconds that rows which are computed take from the card to the host.

    Streamed, one pass: the hidden states and taps of 60,000 tokens take 2.5 GB.
    """
    started = time.perf_counter()
    tokens = sum(map(int, texts)) if isinstance(encoder.layers, StreamedLayers) else EncodeOptions().batch_tokens
    for done in encoder.passes(texts, tokens, EncodeOptions().batch_tokens):
        for _, rows in done.rows:
            half = rows.astype(mx.float16)
            mx.eval(half)
            computed = time.perf_counter()
            np.asarray(half)
            if waits is not None:
                waits.append(time.perf_counter() - computed)
    return time.perf_counter() - started


def _encoder(spec: TextSpec, folder: Path, is_streamed: bool) -> TextEncoder:
    """Layers made at random in memory, or a few files that are read again and again; the embedding is a file."""
    shapes = encoder_weights.tensor_shapes(spec)
    made = RandomTensors(shapes)
    embedding = _write(folder / "embedding.safetensors", made, {EMBEDDING: EMBEDDING})
    tokenizer: Any = Tokens()
    if not is_streamed:
        tensors: Any = RandomTensors(shapes, on_disk=embedding)
        return TextEncoder(spec, tokenizer, tensors, resident_layers(tensors, spec, BITS), compute_dtype(BITS))
    info = dict(embedding)
    for number in range(spec.taps[-1]):
        names = {
            f"layers.{number}.{name}": f"layers.{number % FILES}.{name}" for name in encoder_weights.layer_shapes(spec)
        }
        info |= _write(folder / f"{number % FILES}.safetensors", made, names)
    tensors = Tensors(folder, info)
    return TextEncoder(spec, tokenizer, tensors, StreamedLayers(tensors, spec, BITS), compute_dtype(BITS))


def _write(file: Path, made: RandomTensors, names: Mapping[str, str]) -> dict[str, TensorInfo]:
    """A file of the tensors `names` stand for, where it is not there yet -> its table under those names."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(file), {inside: made.read(inside) for inside in names.values()})
        mx.clear_cache()
    table = read_header(file)
    return {name: table[inside] for name, inside in names.items()}
