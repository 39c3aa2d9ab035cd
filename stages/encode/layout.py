"""How the text encoder fits the memory budget: layers resident or streamed, and how many tokens go in one pass.

A data set that is too large for memory goes in several passes, and streamed layers are read anew in each. That costs
nothing as long as a layer is read faster than a pass computes on it: for FLUX.2 dev, 8192 tokens are 9 TFLOP a layer,
0.7 s at 13.5 TFLOP/s, and 1.1 GB, 0.15 s at 7.3 GB/s. Where little memory makes passes so small that hidden states in a
file would at least halve what is read and written in all, passes are as large as a file makes sense of: four times the
tokens at which reading a layer weighs as much as writing and reading its rows.
"""

from dataclasses import dataclass

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode.encoder_weights import layer_bytes, reading_bytes
from flux2_relay.stages.encode.options import EncodeOptions
from flux2_relay.stages.encode.templates import FAMILIES
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.spec import TextSpec
from flux2_relay.stages.weights import Tensors

_AT_ONCE = 2  # streamed layers in memory: the one in use and the one being read
_PASS_IN_FILE = 4  # times the tokens whose rows weigh as much as a layer, written and read: more would save a fifth
_WORTH = 2  # times what the file costs has to be saved
_CACHE_ROWS = 256  # of mlx-lm's KVCache
_SCRATCH_ROWS = 3  # hidden-wide and MLP-wide temporaries of a batch, counted in MLP-wide rows


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLayout:
    """How captions go through the encoder."""

    streamed: bool
    weights_bytes: int
    """Layers in memory at once, with what the one that is being read is made from."""
    reading_bytes: int
    """What resident layers are made from, one matrix at a time, before any caption runs."""
    scratch_bytes: int
    """Temporaries of one batch."""
    pass_tokens: int
    """Tokens whose hidden states and taps are held while the layers go by."""
    token_bytes: int
    """Hidden states and taps of one token."""
    batch_tokens: int
    """Tokens that run together."""
    spilled: bool
    """Whether rows wait in a file for the next layer (see `spill.py`); memory then holds those of a batch."""

    cache_bytes: int
    """Keys and values that a caption finds before it: its own copy of the shared prefix, in steps of 256 rows."""

    def peak_bytes(self, tokens: int, captions: int) -> int:
        """Predicted peak of live arrays when `captions` of `tokens` in all go through."""
        together = min(tokens, self.batch_tokens)
        scratch = self.scratch_bytes * together // self.batch_tokens
        scratch += self.cache_bytes * captions * together // max(1, tokens)
        held = min(tokens, self.batch_tokens if self.spilled else self.pass_tokens)
        return self.weights_bytes + max(self.reading_bytes, scratch + self.token_bytes * held)

    def file_bytes(self, tokens: int) -> int:
        """Size of the file that rows wait in, of so many tokens in all; 0 where they stay in memory."""
        return self.token_bytes * min(tokens, self.pass_tokens) if self.spilled else 0

    def passes_of(self, tokens: int) -> str:
        """How the tokens are cut, and where they wait."""
        where = f" in a file of {in_words(self.file_bytes(tokens))}" if self.spilled else ""
        return f"{self.pass_tokens} tokens a pass{where}"

    def in_words(self, spec: TextSpec, weights: str) -> str:
        """One line for the log; `weights` says how they are kept."""
        how = f"streamed, {self.passes_of(self.pass_tokens)}" if self.streamed else "resident"
        return f"{spec.taps[-1]} of {spec.layers} layers, {weights}, {how}"


def text_layout(
    spec: TextSpec, options: EncodeOptions, budget_bytes: int, tensors: Tensors, tokens: int = 0, room_bytes: int = 0
) -> TextLayout:
    """The layout that `encode.stream` and the budget ask for; InputError says the smallest budget that works.

    `tensors` are those of the encoder, which may be packed on disk and then stays so. `tokens` are to be encoded, and a
    file of `room_bytes` may be written.
    """
    item = 4 if options.bits == 32 else 2
    one = layer_bytes(spec, options.bits, tensors)
    one_read = one + reading_bytes(tensors, spec, options.bits)
    # A batch computes the MLP's two halves and their product; a whole-context caption also its attention scores.
    scratch_of_token = item * (_SCRATCH_ROWS * spec.mlp_width + 4 * spec.hidden)
    scratch = options.batch_tokens * scratch_of_token
    of_token = item * spec.hidden * (len(spec.taps) + 1)  # hidden states and taps
    resident = one * spec.taps[-1]
    all_resident = resident + scratch + of_token * options.batch_tokens
    streamed = options.stream == "always" or (options.stream == "auto" and all_resident > budget_bytes)
    weights = one * (_AT_ONCE - 1) + one_read if streamed else resident
    left = budget_bytes - weights - scratch
    if left < of_token * spec.length and options.stream != "never":
        smallest = one + one_read + scratch + of_token * spec.length
        raise InputError(
            f"memory.budget: {in_words(budget_bytes)} is too little for the text encoder; {in_words(smallest)} is the "
            "least that works with this encode.batch_tokens, a smaller one needs less"
        )
    shares_rows = FAMILIES[spec.family].pads_see == "nothing"
    fits = (budget_bytes - weights) // (of_token + scratch_of_token)  # where not even one batch does
    of_pass = max(left // of_token, min(options.batch_tokens, fits)) if streamed else options.batch_tokens
    together = min(options.batch_tokens, of_pass)
    of_file = _pass_in_file(tensors, item * spec.hidden, tokens, of_pass, room_bytes // of_token) if streamed else None
    return TextLayout(
        streamed=streamed,
        weights_bytes=weights,
        reading_bytes=0 if streamed else one_read - one,
        scratch_bytes=together * scratch_of_token,
        pass_tokens=of_file or of_pass,
        token_bytes=of_token,
        batch_tokens=together,
        spilled=of_file is not None,
        cache_bytes=2 * item * spec.kv_heads * spec.head_dim * _CACHE_ROWS if shares_rows else 0,
    )


def _pass_in_file(tensors: Tensors, row_bytes: int, tokens: int, in_memory: int, most: int) -> int | None:
    """Tokens of a pass whose rows wait in a file, None where that is not worth it; of one layer all the same.

    `in_memory` is what a pass without a file has, `most` what the disk has room for.
    """
    layer = sum(info.end - info.start for name, info in tensors.info.items() if name.startswith("layers.0."))
    of_pass = min(tokens, most, _PASS_IN_FILE * layer // (2 * row_bytes))
    if of_pass <= in_memory:
        return None
    saved = (-(-tokens // in_memory) - -(-tokens // of_pass)) * layer
    return of_pass if saved > _WORTH * 2 * row_bytes * tokens else None
