"""Captions to the context that the transformer reads: the text encoder, only as much of it as is needed.

Layers beyond the last tap, the final norm, the head and any vision tower are never read. Decoder layers, KV cache and
quantization are mlx-lm's; taps, pads, the shared prefix and the order of layers are ours.

Layer by layer. A layer goes over all captions of a pass before the next one is needed, so it may as well come from
disk: streamed, a 24B encoder runs unquantized in the memory of two layers, each read once a pass. Resident layers take
the same way, so both give the same numbers.

Exact savings. Where pads see nothing (left of the text), a pad row is one constant, the prefix rows are the same for
every caption, and only a caption's own tokens are computed. Where pads see the caption (right of the text), all rows
differ, but keys and values are kept for real tokens alone.

Letters: B captions of a group, T text rows, P prefix rows, n own tokens, C = taps * hidden.
Source: diffusers `Flux2Pipeline` and `Flux2KleinPipeline`, `encode_prompt`, on transformers with attention sdpa.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flux2_relay.stages import folders
from flux2_relay.stages.context import assemble
from flux2_relay.stages.encode import encoder_weights, sequences
from flux2_relay.stages.encode.layers import StreamedLayers, compute_dtype, resident_layers
from flux2_relay.stages.encode.spill import Spill
from flux2_relay.stages.encode.templates import CaptionTokenizer, load_tokenizer
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import Tensors

BATCH_TOKENS = 8192
_STEP = 16  # captions whose lengths round up to the same multiple run together

Shared = tuple[sequences.PrefixRows, sequences.PadRow]


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass through the layers gave."""

    rows: Iterator[tuple[int, mx.array]]
    """(index, rows) of each caption: own rows [n, C], or all rows [T, C]; to be taken before the next pass."""
    shared: dict[str, mx.array]
    """`prefix` [P, C] and `pad` [1, C] where captions share them, else empty."""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder up to its last tap; `encode` gives what diffusers' `encode_prompt` gives."""

    spec: TextSpec
    tokenizer: CaptionTokenizer
    tensors: Tensors
    layers: Iterable[nn.Module]
    dtype: mx.Dtype
    spill: Path | None = None
    """The folder for a file that holds hidden states between layers; None: they stay in memory."""

    def encode(self, captions: Sequence[str]) -> mx.array:
        """Captions -> context [B, T, C] in the compute dtype, pads included."""
        contexts: dict[int, mx.array] = {}
        for done in self.passes(captions):
            for index, rows in done.rows:
                shared = done.shared
                contexts[index] = assemble(rows, **shared, length=self.spec.length) if shared else rows
        return mx.stack([contexts[index] for index in range(len(captions))])

    def cost(self, caption: str) -> int:
        """Tokens that a caption sends through the layers."""
        return self.tokenizer.cost(caption)

    def passes(
        self,
        captions: Sequence[str],
        pass_tokens: int = BATCH_TOKENS,
        batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[float], None] = lambda tokens: None,
        choose: Callable[[list[int]], list[int]] = lambda indices: indices,
    ) -> Iterator[Pass]:
        """Each pass as it is done; without captions one pass gives the shared rows alone.

        A pass holds at most `pass_tokens` tokens (and one caption at least), of which `batch_tokens` run together.
        `progress` is told tokens, a layer's share of them at a time. `choose` is asked when a pass begins which of its
        captions are to be encoded: another process may be at the others, or have seen to them.
        """
        own = [self._own(caption) for caption in captions]
        costs = [self.cost(caption) for caption in captions]
        for whole in list(cut(costs, pass_tokens)) or [[]]:
            part = choose(whole)
            progress(sum(costs[index] for index in whole) - sum(costs[index] for index in part))
            if whole and not part:
                continue
            shared = self._shared()
            with ExitStack() as held:
                spill = held.enter_context(Spill(self.spill)) if self.spill else None
                groups = []
                for indices in self._together(part, own, costs, batch_tokens):
                    groups.append(self._group(indices, own, shared))
                    if spill:
                        spill.put(groups[-1], len(self.spec.taps))
                self._run([*shared, *groups], progress, spill)
                named = {name: rows.tapped()[0] for name, rows in zip(("prefix", "pad"), shared, strict=False)}
                yield Pass(_results(groups, spill), named)

    def _own(self, caption: str) -> list[int]:
        return self.tokenizer.own(self.tokenizer.ids(caption))

    def _run(self, running: Sequence[sequences.Rows], progress: Callable[[float], None], spill: Spill | None) -> None:
        """Every layer over all rows in turn, the prefix first."""
        numbers = count(1)  # `enumerate` would keep hold of the layer before
        for layer in self.layers:
            number = next(numbers)
            for rows in spill.each(running) if spill else running:
                rows.step(layer)
                if number in self.spec.taps:
                    rows.tap()
                mx.eval(rows.hidden)
                progress(rows.tokens / self.spec.taps[-1])
            del layer  # before the next one is asked for: streamed layers come one ahead

    def _shared(self) -> Shared | tuple[()]:
        if not self.tokenizer.shares_rows:
            return ()
        prefix, pad = self.tokenizer.prefix, (self.tokenizer.pad,)
        return sequences.PrefixRows(self._embed([prefix])), sequences.PadRow(self._embed([pad]))

    def _together(
        self, part: Sequence[int], own: Sequence[Sequence[int]], costs: Sequence[int], batch_tokens: int
    ) -> Iterator[list[int]]:
        """The captions of a pass by similar length, in groups of at most `batch_tokens` tokens."""
        by_length: dict[int, list[int]] = {}
        for index in part:
            by_length.setdefault(-(-len(own[index]) // _STEP), []).append(index)
        for length in sorted(by_length):
            alike = by_length[length]
            for group in cut([costs[index] for index in alike], batch_tokens):
                yield [alike[place] for place in group]

    def _group(
        self, indices: list[int], own: Sequence[Sequence[int]], shared: Shared | tuple[()]
    ) -> sequences.CaptionRows:
        lengths = [len(own[index]) for index in indices]
        width = max(lengths) if shared else self.spec.length
        filled = [[*own[index], *[self.tokenizer.pad] * (width - len(own[index]))] for index in indices]
        if shared:
            return sequences.OwnRows(indices, lengths, self._embed(filled), shared[0])
        return sequences.AllRows(indices, lengths, self._embed(filled))

    def _embed(self, ids: Sequence[Sequence[int]]) -> mx.array:
        return encoder_weights.embedding_rows(self.tensors, np.array(ids, dtype=np.int64), self.dtype)


def _results(groups: list[sequences.CaptionRows], spill: Spill | None) -> Iterator[tuple[int, mx.array]]:
    """(index, rows) of every caption; a group is let go of when the next one's turn comes."""
    groups.reverse()
    while groups:
        group = groups.pop()
        if spill:
            spill.fetch_taps(group)
        yield from group.results()


def cut(costs: Sequence[int], limit: int) -> Iterator[list[int]]:
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
    streamed: bool = False,
) -> TextEncoder:
    """The text encoder of `model_dir` (or of `folder`, with a tokenizer), layers up to the last tap, at `bits`.

    Computes in float32 at 32 bits, else in bfloat16. An encoder that is packed on disk keeps its own bits. `streamed`
    reads the layers anew in each pass instead of holding them. InputError lists tensors that do not fit.
    """
    tokenizer = tokenizer or load_tokenizer(folders.find(str(model_dir)).tokenizer, spec)
    tensors = encoder_weights.open_encoder(folder or folders.find(str(model_dir)).text_encoder, spec)
    layers = StreamedLayers(tensors, spec, bits) if streamed else resident_layers(tensors, spec, bits)
    return TextEncoder(spec, tokenizer, tensors, layers, compute_dtype(bits))
