"""How the text encoder fits the memory budget: layers resident or streamed, and how many tokens go in one pass.

Hidden states stay in memory; a data set that is too large for it goes in several passes. Writing them to disk would
save reading the layers again, which costs nothing as long as a layer is read faster than a pass computes on it: for
FLUX.2 dev, 8192 tokens are 9 TFLOP a layer, 0.7 s at 13.5 TFLOP/s, and 1.1 GB, 0.15 s at 7.3 GB/s.
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

    cache_bytes: int
    """Keys and values that a caption finds before it: its own copy of the shared prefix, in steps of 256 rows."""

    def peak_bytes(self, tokens: int, captions: int) -> int:
        """Predicted peak of live arrays when `captions` of `tokens` in all go through."""
        together = min(tokens, self.batch_tokens)
        scratch = self.scratch_bytes * together // self.batch_tokens
        scratch += self.cache_bytes * captions * together // max(1, tokens)
        return self.weights_bytes + max(self.reading_bytes, scratch + self.token_bytes * min(tokens, self.pass_tokens))

    def in_words(self, spec: TextSpec, weights: str) -> str:
        """One line for the log; `weights` says how they are kept."""
        how = f"streamed, {self.pass_tokens} tokens a pass" if self.streamed else "resident"
        return f"{spec.taps[-1]} of {spec.layers} layers, {weights}, {how}"


def text_layout(spec: TextSpec, options: EncodeOptions, budget_bytes: int, tensors: Tensors) -> TextLayout:
    """The layout that `encode.stream` and the budget ask for; InputError says the smallest budget that works.

    `tensors` are those of the encoder, which may be packed on disk and then stays so.
    """
    item = 4 if options.bits == 32 else 2
    one = layer_bytes(spec, options.bits, tensors)
    one_read = one + reading_bytes(tensors, spec, options.bits)
    # A batch computes the MLP's two halves and their product; a whole-context caption also its attention scores.
    scratch = options.batch_tokens * item * (_SCRATCH_ROWS * spec.mlp_width + 4 * spec.hidden)
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
    tokens = max(options.batch_tokens, left // of_token) if streamed else options.batch_tokens
    return TextLayout(
        streamed=streamed,
        weights_bytes=weights,
        reading_bytes=0 if streamed else one_read - one,
        scratch_bytes=scratch,
        pass_tokens=tokens,
        token_bytes=of_token,
        batch_tokens=options.batch_tokens,
        cache_bytes=2 * item * spec.kv_heads * spec.head_dim * _CACHE_ROWS if shares_rows else 0,
    )
