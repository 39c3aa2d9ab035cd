"""What stage one would do, found out without reading a weight: which entries it wants, its layouts, its time.

Keys hold the identity of the text encoder's weights. Where those are large and were never hashed on this machine, it is
left open: every other part of the keys is known, so what might be there can still be told.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod

from flux2_relay.stages import figures, identity, packed, vae
from flux2_relay.stages.encode import spill, stage
from flux2_relay.stages.encode.encoder_weights import encoder_identity, encoder_packings, open_encoder
from flux2_relay.stages.encode.entries import Wanted, wanted
from flux2_relay.stages.encode.layout import text_layout
from flux2_relay.stages.encode.notes import notes
from flux2_relay.stages.encode.stage import Job
from flux2_relay.stages.encode.survey import Survey, survey
from flux2_relay.stages.encode.templates import CaptionTokenizer, load_tokenizer
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.spec import TextSpec, VaeSpec, read_text_spec, read_vae_spec
from flux2_relay.stages.weights import Tensors

UNKNOWN = "identity unknown"
"""Stands in keys for the identity of an encoder that was not hashed."""

_SLACK_BYTES = 12 << 10  # of an entry: its folder and two files
_RATIOS = {"own": 1.42, "all": 1.61, "prefix": 1.42, "pad": 1.0}  # of bfloat16 text rows, measured on real ones
_LATENTS_RATIOS = {"float32": 1.2, "float16": 1.18, "bfloat16": 1.47}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What stage one wants, of which models."""

    want: Wanted
    encoder: str | None
    """Identity of the text encoder's weights, None where it is unknown."""
    tensors: Tensors
    packing: packed.Packing | None
    text: TextSpec
    tokenizer: CaptionTokenizer
    vae: VaeSpec
    survey: Survey
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPhase:
    """How captions would go through the text encoder."""

    captions: int
    tokens: int
    layout: str
    streamed: bool
    passes: int
    captions_a_pass: int
    """What a kill can lose at most."""
    peak_bytes: int
    seconds: float | None
    """None where nothing was measured on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePhase:
    """How pictures would go through the VAE."""

    pictures: int
    strip_rows: int | None
    """Rows of a strip of the largest picture, None where it goes whole."""
    peak_bytes: int
    seconds: float | None


def forecast(job: Job, hash_weights: Callable[[Tensors], None] | None) -> Forecast:
    """What the job wants; `hash_weights` is called before weights of unknown identity are hashed, None leaves it open.

    Nothing is created, no weight is read but for its hash.
    """
    text_spec, vae_spec = read_text_spec(job.folders.text_encoder), read_vae_spec(job.folders.vae)
    tokenizer = load_tokenizer(job.folders.tokenizer, text_spec)
    tensors = open_encoder(job.folders.text_encoder, text_spec)
    packing = packed.summary(encoder_packings(tensors, text_spec))
    is_open = hash_weights is None and not identity.is_cheap(tensors)
    if hash_weights is not None and not identity.is_remembered(tensors):
        hash_weights(tensors)
    encoder = None if is_open else encoder_identity(tensors, text_spec)
    text = stage.text_identity(job, text_spec, tokenizer, packing, encoder or UNKNOWN)
    want = wanted(job.samples, job.prompts, text, stage.latents_identity(job, vae_spec), job.seed)
    return Forecast(
        want=want,
        encoder=encoder,
        tensors=tensors,
        packing=packing,
        text=text_spec,
        tokenizer=tokenizer,
        vae=vae_spec,
        survey=survey(job.samples, want),
        notes=tuple(notes(job.samples, tokenizer)),
    )


def text_phase(job: Job, known: Forecast, missing: Collection[str]) -> TextPhase:
    """The turn of the text encoder for these missing entries; InputError where the budget is too small."""
    captions = [known.want.text[key]["caption"] for key in missing]
    costs = [known.tokenizer.cost(str(caption)) for caption in captions if caption is not None]
    tokens = sum(costs)
    layout = text_layout(known.text, job.encode, job.budget_bytes, known.tensors, tokens, spill.room_bytes())
    a_pass = len(costs) if tokens <= layout.pass_tokens else max(1, layout.pass_tokens * len(costs) // tokens)
    pace = figures.recall("text tokens", stage.pace_of_text(known.encoder, job.encode, layout))
    weights = known.packing.in_words() if known.packing else f"{job.encode.bits} bit"
    return TextPhase(
        captions=len(costs),
        tokens=tokens,
        layout=f"{known.text.taps[-1]} of {known.text.layers} layers, {weights}, "
        + ("streamed from disk" if layout.streamed else "resident")
        + (f", hidden states in a file of {in_words(layout.file_bytes(tokens))}" if layout.spilled else ""),
        streamed=layout.streamed,
        passes=-(-len(costs) // max(1, a_pass)),
        captions_a_pass=a_pass,
        peak_bytes=layout.peak_bytes(tokens, len(costs)),
        seconds=tokens / pace.per_second if pace else None,
    )


def image_phase(job: Job, known: Forecast, missing: Collection[str]) -> ImagePhase:
    """The turn of the VAE for these missing entries, of which there is one at least."""
    wants = [known.want.latents[key] for key in missing]
    rows, peak = vae.encoder_peak(known.vae, stage.largest_of(wants), job.budget_bytes)
    pace = figures.recall("pixels", stage.pace_of_vae(known.vae))
    pixels = sum(prod(want.placement.crop[2:]) for want in wants)
    return ImagePhase(
        pictures=len(wants),
        strip_rows=rows,
        peak_bytes=peak,
        seconds=pixels / pace.per_second if pace else None,
    )


def stored_bytes(job: Job, known: Forecast, missing: Mapping[str, Collection[str]], codec: str) -> int:
    """About what these entries will take on disk, by ratios measured on real ones."""
    is_packed = codec != "none"
    total = sum(_text_bytes(job, known, known.want.text[key], is_packed) for key in missing.get("text", ()))
    for key in missing.get("latents", ()):
        raw = _ITEM_BYTES[job.latents_dtype] * known.vae.patch[0] * known.vae.patch[1] * known.vae.latent_channels
        raw *= prod(known.want.latents[key].placement.crop[2:]) // 256
        total += _SLACK_BYTES + int(raw / (_LATENTS_RATIOS[job.latents_dtype] if is_packed else 1))
    for key in missing.get("masks", ()):
        total += _SLACK_BYTES + 4 * prod(known.want.masks[key].placement.crop[2:]) // 256
    return total


def _text_bytes(job: Job, known: Forecast, key_object: Mapping[str, object], is_packed: bool) -> int:
    kind, caption = str(key_object["rows"]), key_object["caption"]
    rows = {"prefix": len(known.tokenizer.prefix), "pad": 1}.get(kind) or known.tokenizer.cost(str(caption))
    raw = rows * known.text.context_width * _ITEM_BYTES[job.text_dtype]
    ratio = _RATIOS[kind] if is_packed else 1.0
    if job.text_dtype == "float32":  # of bfloat16 values half the bits are zero; others hardly shrink
        ratio = 1.0 if job.encode.bits == 32 or not is_packed else 2 * ratio
    return _SLACK_BYTES + int(raw / ratio)
