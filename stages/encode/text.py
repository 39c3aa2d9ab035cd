"""Captions to the context that the transformer reads: the text encoder, only as much of it as is needed.

Layers beyond the last tap, the final norm, the head and any vision tower are never read. Decoder layers, KV cache and
quantization are mlx-lm's; taps, pads, the shared prefix and the order of layers are ours.

Exact savings. Where pads see nothing (left of the text), a pad row is one constant, the prefix rows are the same for
every caption, and only a caption's own tokens are computed. Where pads see the caption (right of the text), all rows
differ, but keys and values are kept for real tokens alone.

Letters: B captions, T text rows, P prefix rows, n own tokens, C = taps * hidden.
Source: diffusers `Flux2Pipeline` and `Flux2KleinPipeline`, `encode_prompt`, on transformers with attention sdpa.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux2_relay.stages.context import assemble
from flux2_relay.stages.encode import encoder_weights, layers, sequences
from flux2_relay.stages.encode.templates import CaptionTokenizer, load_tokenizer
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import Tensors

_STEP = 16  # captions whose lengths round up to the same multiple run together


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder in memory up to its last tap; `encode` gives what diffusers' `encode_prompt` gives."""

    spec: TextSpec
    tokenizer: CaptionTokenizer
    tensors: Tensors
    layers: Sequence[nn.Module]
    dtype: mx.Dtype

    def encode(self, captions: Sequence[str]) -> mx.array:
        """Captions -> context [B, T, C] in the compute dtype, pads included."""
        rows = [row for _, row in sorted(self.rows(captions), key=lambda pair: pair[0])]
        if self.shares_rows:
            prefix, pad = self.shared_rows()
            rows = [assemble(own, prefix, pad, self.spec.length) for own in rows]
        return mx.stack(rows)

    @property
    def shares_rows(self) -> bool:
        """Whether all captions share prefix and pad rows, so that `rows` gives own rows alone."""
        return self.tokenizer.shares_rows

    def rows(self, captions: Sequence[str], batch_tokens: int = 8192) -> Iterator[tuple[int, mx.array]]:
        """(index, rows) of each caption as its pass is done: own rows [n, C], or all rows [T, C].

        A pass takes at most `batch_tokens` tokens (one caption at least); captions of similar length run together.
        """
        own = [self.tokenizer.own(self.tokenizer.ids(caption)) for caption in captions]
        for part in passes([len(ids) if self.shares_rows else self.spec.length for ids in own], batch_tokens):
            shared = self._shared()
            groups = [self._group(indices, own, shared) for indices in self._by_length(part, own)]
            self._run([*shared, *groups])
            for group in groups:
                yield from group.results()

    def shared_rows(self) -> tuple[mx.array, mx.array]:
        """The prefix rows [P, C] and the pad row [1, C] that all captions share."""
        shared = self._shared()
        assert shared  # asked only where `shares_rows`
        prefix, pad = shared
        self._run(shared)
        return prefix.tapped()[0], pad.tapped()[0]

    def _run(self, running: Sequence[sequences.Rows]) -> None:
        """Every layer over all rows in turn, the prefix first: each layer is needed once a pass."""
        for number, layer in enumerate(self.layers, start=1):
            for rows in running:
                rows.step(layer)
                if number in self.spec.taps:
                    rows.tap()
            mx.eval([rows.hidden for rows in running])

    def _shared(self) -> tuple[sequences.PrefixRows, sequences.PadRow] | tuple[()]:
        if not self.shares_rows:
            return ()
        prefix, pad = self.tokenizer.prefix, (self.tokenizer.pad,)
        return sequences.PrefixRows(self._embed([prefix])), sequences.PadRow(self._embed([pad]))

    def _by_length(self, part: Sequence[int], own: Sequence[Sequence[int]]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for index in part:
            groups.setdefault(-(-len(own[index]) // _STEP), []).append(index)
        return [groups[length] for length in sorted(groups)]

    def _group(self, indices: list[int], own: Sequence[Sequence[int]], shared: Sequence) -> sequences.CaptionRows:
        lengths = [len(own[index]) for index in indices]
        width = max(lengths) if shared else self.spec.length
        filled = [[*own[index], *[self.tokenizer.pad] * (width - len(own[index]))] for index in indices]
        if shared:
            return sequences.OwnRows(indices, lengths, self._embed(filled), shared[0])
        return sequences.AllRows(indices, lengths, self._embed(filled))

    def _embed(self, ids: Sequence[Sequence[int]]) -> mx.array:
        return encoder_weights.embedding_rows(self.tensors, np.array(ids, dtype=np.int64), self.dtype)


def passes(costs: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in order, cut so that the costs of a part add up to `limit` at most (one item at least)."""
    part: list[int] = []
    total = 0
    for index, cost in enumerate(costs):
        if part and total + cost > limit:
            yield part
            part, total = [], 0
        part.append(index)
        total += cost
    if part:
        yield part


def load_text_encoder(
    model_dir: Path | str,
    spec: TextSpec,
    bits: int = 16,
    folder: Path | None = None,
    tokenizer: CaptionTokenizer | None = None,
) -> TextEncoder:
    """The text encoder of `model_dir` (or of `folder`, with a tokenizer), layers up to the last tap, at `bits`.

    Computes in float32 at 32 bits, else in bfloat16. InputError lists tensors that do not fit.
    """
    tokenizer = tokenizer or load_tokenizer(Path(model_dir).expanduser() / "tokenizer", spec)
    tensors = encoder_weights.open_encoder(folder or Path(model_dir).expanduser() / "text_encoder", spec)
    resident = []
    for number in range(spec.taps[-1]):
        layer = layers.decoder_layer(tensors, number, spec, bits)
        mx.eval(layer.parameters())  # one layer at a time: unquantized weights of two never stand side by side
        resident.append(layer)
    return TextEncoder(spec, tokenizer, tensors, resident, mx.float32 if bits == 32 else mx.bfloat16)
