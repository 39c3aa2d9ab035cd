"""Stage one: captions and pictures into the store, one model at a time.

The set is published first, then filled: it is the progress record, the pin against garbage collection and all that
stage two reads. What is in the store already is not encoded again; when nothing is missing, no model is loaded.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from math import prod
from os import environ

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from flux2_relay.cache import Store, audit
from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.cache.sets import SetRecord, needs
from flux2_relay.cache.writer import Writer
from flux2_relay.stages import blas, figures, fp8, identity, measure, names, packed, vae
from flux2_relay.stages.encode import images, masks, spill
from flux2_relay.stages.encode.claims import Claims
from flux2_relay.stages.encode.dataset import Sample
from flux2_relay.stages.encode.encoder_weights import encoder_identity, encoder_packings, open_encoder
from flux2_relay.stages.encode.entries import (
    LatentsIdentity,
    LatentsWant,
    MaskWant,
    Prompt,
    TextIdentity,
    Wanted,
    wanted,
)
from flux2_relay.stages.encode.layout import TextLayout, text_layout
from flux2_relay.stages.encode.notes import notes, of_disk
from flux2_relay.stages.encode.options import EncodeOptions
from flux2_relay.stages.encode.sharing import WHOLE, Shard, own_order
from flux2_relay.stages.encode.templates import CaptionTokenizer, load_tokenizer
from flux2_relay.stages.encode.upkeep import look_over
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.one_model import in_turn, say_loaded
from flux2_relay.stages.spec import TextSpec, VaeSpec, read_text_spec, read_vae_spec
from flux2_relay.stages.weights import Tensors, listing

TextWants = Mapping[str, Mapping[str, object]]
"""Text entries to be made: key -> key object."""

_AT_ONCE = 8  # pictures that a process claims: as many may be waited for at the end
_ROUNDS = 3  # how often entries that vanish while we encode are made again before we give up

environ.setdefault("MLX_ENABLE_TF32", "0")  # stage one runs once: float32 means float32, on every device


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to encode, with what, and into which store."""

    store: Store
    name: str
    request: Mapping[str, object]  # what names the set: see `pipeline.request`
    folders: ModelFolders
    samples: Sequence[Sample]
    prompts: Sequence[Prompt]
    encode: EncodeOptions
    text_dtype: str
    latents_dtype: str
    seed: int
    budget_bytes: int
    say: Callable[[str], None]
    told: Mapping[str, object] = field(default_factory=dict)
    """What is told beside the set and no part of its name."""
    shard: Shard = WHOLE
    """What of it falls to this process."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a run of stage one did."""

    set: str
    captions: int  # encoded now and here, shared rows not counted
    images: int
    present: int  # entries that were there before
    others: int = 0  # entries of other shards that are not there yet


def _item(dtype: str) -> int:
    """Bytes of a number as the store keeps it."""
    return 4 if dtype == "float32" else 2


def encode(job: Job) -> Encoded:
    """Fill the store with every entry that the job needs and that falls to its shard.

    InputError names pictures that turned out unreadable; everything else is committed before it is raised.
    """
    if swept := audit.sweep(job.store, now=time.time()):
        job.say(f"{job.store.name}: deleted what {swept} writers left that died more than a day ago")
    text_spec, vae_spec = read_text_spec(job.folders.text_encoder), read_vae_spec(job.folders.vae)
    tokenizer = load_tokenizer(job.folders.tokenizer, text_spec)
    encoder_tensors = open_encoder(job.folders.text_encoder, text_spec)
    text, latents = identities(job, text_spec, vae_spec, tokenizer, encoder_tensors)
    want = wanted(job.samples, job.prompts, text, latents, job.seed)
    for note in notes(job.samples, tokenizer):
        job.say(note)
    record = _publish_set(job, text, latents, want)
    own = job.shard.of(needs(record.body))
    look_over(job.store, own, job.say)
    missing = job.store.missing(record, patient=False)
    places = vae_spec.patch[0] * vae_spec.patch[1] * vae_spec.latent_channels
    item_bytes = text_spec.context_width * _item(job.text_dtype), places * _item(job.latents_dtype)
    for note in of_disk(job.store.path, want, missing, tokenizer, item_bytes):
        job.say(note)
    present = len(want.text) + len(want.latents) + len(want.masks) - sum(map(len, missing.values()))
    captions = pictures = rounds = 0
    with Claims(job.store.path / "tmp/claims") as claims:
        while (mine := job.shard.of(missing)) and rounds < _ROUNDS:
            bad = _encode_masks(job, {key: want.masks[key] for key in mine.get("masks", ())})
            if keys := claims.free(mine.get("text", ())):
                wants = own_order({key: want.text[key] for key in keys})
                captions += _text_in_turn(job, claims, text_spec, tokenizer, wants)
            if keys := claims.free(mine.get("latents", ())):
                wants = own_order({key: want.latents[key] for key in keys})
                done, unread = _latents_in_turn(job, claims, vae_spec, wants)
                pictures, bad = pictures + done, bad + unread
            waited = _await_others(job, claims, _still_missing(job, record))
            rounds += not waited
            missing = _still_missing(job, record)
            if bad:
                raise InputError(listing("these pictures could not be read; all others are in the store:", bad))
            if not job.shard.of(missing) and look_over(job.store, own, job.say, full=True):
                missing = _still_missing(job, record)
    if mine := job.shard.of(missing):
        counts = ", ".join(f"{len(keys)} of {kind}" for kind, keys in mine.items())
        doubt = "is something else deleting them, or is the disk failing?"
        raise RelayError(f"{job.store.name}: entries keep vanishing ({counts}); {doubt}")
    return Encoded(record.key, captions, pictures, present, sum(map(len, missing.values())))


def needed(job: Job) -> Wanted:
    """Every entry that the job needs; loads no model."""
    text_spec, vae_spec = read_text_spec(job.folders.text_encoder), read_vae_spec(job.folders.vae)
    tokenizer = load_tokenizer(job.folders.tokenizer, text_spec)
    encoder_tensors = open_encoder(job.folders.text_encoder, text_spec)
    both = identities(job, text_spec, vae_spec, tokenizer, encoder_tensors)
    return wanted(job.samples, job.prompts, *both, job.seed)


def identities(
    job: Job, text_spec: TextSpec, vae_spec: VaeSpec, tokenizer: CaptionTokenizer, tensors: Tensors
) -> tuple[TextIdentity, LatentsIdentity]:
    """What the keys say of both models; hashes weights that this machine has not hashed before."""
    if not identity.is_remembered(tensors):
        size = identity.size_of(tensors)
        job.say(f"hashing {measure.in_words(size)} of text encoder weights (once on this machine)")
    if packing := packed.summary(encoder_packings(tensors, text_spec)):
        compute = "float32" if job.encode.bits == 32 else "bfloat16"
        job.say(
            f"{tensors.source}: is packed already ({packing.in_words()}) and stays so; of encode.bits "
            f"{job.encode.bits} only the arithmetic follows, {compute}"
        )
    if fp8.is_fp8(tensors):
        job.say(f"{tensors.source}: holds 8-bit floats (fp8), which are off by some 3 %; bfloat16 ones are exact")
    text = text_identity(job, text_spec, tokenizer, packing, encoder_identity(tensors, text_spec))
    return text, latents_identity(job, vae_spec)


def text_identity(
    job: Job, spec: TextSpec, tokenizer: CaptionTokenizer, packing: packed.Packing | None, encoder: str
) -> TextIdentity:
    """What the keys of all captions have in common; `encoder` is the identity of the weights."""
    return TextIdentity(
        encoder=encoder,
        tokenizer=tokenizer.file_sha256,
        template=tokenizer.template.identity(),
        taps=spec.taps,
        length=spec.length,
        bits=job.encode.bits,
        packing=packing,
        dtype=job.text_dtype,
        shares_rows=tokenizer.shares_rows,
    )


def latents_identity(job: Job, spec: VaeSpec) -> LatentsIdentity:
    """What the keys of all latents have in common."""
    of_vae = vae_identity(names.open_vae(job.folders.vae), spec)
    return LatentsIdentity(vae=of_vae, tf32=uses_tf32(), dtype=job.latents_dtype)


def vae_identity(tensors: Tensors, spec: VaeSpec) -> str:
    """Identity of a VAE as an encoder: its encoder half, quant_conv and batch-norm statistics.

    InputError names what is not as the spec says: this is asked before captions are encoded, the VAE is loaded after.
    """
    used = vae.encoder_tensor_names(spec)
    tensors.check(used, ignore=lambda name: name not in used)
    return identity.weights_identity(tensors, used, vae.identity_config(spec))


def uses_tf32() -> bool:
    """Whether float32 products may be rounded to TF32 on this device."""
    return mx.default_device() == mx.Device(mx.gpu) and environ.get("MLX_ENABLE_TF32", "1") != "0"


def _publish_set(job: Job, text: TextIdentity, latents: LatentsIdentity, want: Wanted) -> SetRecord:
    body = {
        "name": job.name,
        "request": job.request,
        "identities": {
            "encoder": text.encoder,
            "tokenizer": text.tokenizer,
            "template": text.template,
            "vae": latents.vae,
        },
        "shared": want.shared,
        "samples": want.samples,
        "prompts": want.prompts,
    }
    made = {**_made(), **job.told}
    made["at"] = job.store.time_for_set(str(made["at"]))
    return job.store.open_set(job.store.publish_set(body, made))


def _still_missing(job: Job, record: SetRecord) -> dict[str, list[str]]:
    """What the store lacks at the end; a set that was dropped meanwhile is published again, so that it stays so."""
    if record.key not in job.store.set_keys():
        job.store.publish_set(record.body, record.made)
    return job.store.missing(record, patient=False)


def _await_others(job: Job, claims: Claims, missing: Mapping[str, Sequence[str]]) -> bool:
    """Wait for the entries that other processes are making -> whether there were any."""
    theirs = {kind: claims.others(keys) for kind, keys in job.shard.of(missing).items()}
    if count := sum(map(len, theirs.values())):
        job.say(f"{job.store.name}: waiting for {count} entries that another process is making")
    for kind, keys in theirs.items():
        claims.wait_for(keys, partial(job.store.has, kind))
    return count > 0


def _text_in_turn(job: Job, claims: Claims, spec: TextSpec, tokenizer: CaptionTokenizer, wants: TextWants) -> int:
    blas.suit(spec.hidden)
    tensors = open_encoder(job.folders.text_encoder, spec)
    costs = [tokenizer.cost(str(key["caption"])) for key in wants.values() if key["caption"] is not None]
    layout = text_layout(spec, job.encode, job.budget_bytes, tensors, sum(costs), spill.room_bytes())
    work = partial(_encode_text, job, claims, tokenizer, wants, layout)
    pace = figures.recall("text tokens", pace_of_text(_encoder_of(wants), job.encode, layout))
    seconds = sum(costs) / pace.per_second if pace else None
    return in_turn("text encoder", partial(work, spec), job.say, layout.peak_bytes(sum(costs), len(costs)), seconds)


def _encoder_of(wants: TextWants) -> object:
    """The identity of the encoder that all of them are of."""
    return next(iter(wants.values()))["encoder"]


def _encode_text(
    job: Job, claims: Claims, tokenizer: CaptionTokenizer, wants: TextWants, layout: TextLayout, spec: TextSpec
) -> int:
    """Encode captions, those left out that another process has seen to or is at -> how many."""
    from flux2_relay.stages.encode import text  # only here: mlx-lm takes seconds to import

    encoder = text.load_text_encoder(
        job.folders.root, spec, job.encode.bits, job.folders.text_encoder, tokenizer, layout.streamed
    )
    packing = packed.summary(encoder_packings(encoder.tensors, spec))
    weights = packing.in_words() if packing else f"{job.encode.bits} bit"
    say_loaded(f"text encoder ({layout.in_words(spec, weights)})", job.say)
    encoder = replace(encoder, spill=spill.folder() if layout.spilled else None)
    keys = {str(of["caption"]): key for key, of in wants.items() if of["caption"] is not None}
    captions = list(keys)
    shared = {str(of["rows"]): key for key, of in wants.items() if of["caption"] is None}
    total, started, encoded = sum(map(encoder.cost, captions)), time.perf_counter(), []

    def choose(indices: list[int]) -> list[int]:
        mine = claims.take([*shared.values(), *(keys[captions[index]] for index in indices)])
        mine = {key for key in mine if not job.store.has("text", key)}
        return [index for index in indices if keys[captions[index]] in mine]

    with tqdm(total=total, desc=f"{len(captions)} captions", unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        advance = partial(_advance, bar, claims)
        for done in encoder.passes(captions, layout.pass_tokens, layout.batch_tokens, advance, choose):
            with Writer(job.store) as writer:
                for name, rows in done.shared.items():
                    if key := shared.pop(name, None):
                        writer.put(
                            "text", wants[key], _stored(rows, job.text_dtype), {**_made(), "tokens": rows.shape[0]}
                        )
                for index, rows in done.rows:
                    made = {**_made(), "tokens": len(tokenizer.ids(captions[index]))}
                    writer.put("text", wants[keys[captions[index]]], _stored(rows, job.text_dtype), made)
                    encoded.append(encoder.cost(captions[index]))
            claims.release()  # now that they are in the store
    pace = pace_of_text(_encoder_of(wants), job.encode, layout)
    figures.note("text tokens", pace, sum(encoded), time.perf_counter() - started)
    return len(encoded)


def pace_of_text(encoder: object, options: EncodeOptions, layout: TextLayout) -> dict[str, object]:
    """What tokens a second depend on, for `figures`; `encoder` is its identity."""
    return {"encoder": encoder, "bits": options.bits, "streamed": layout.streamed}


def pace_of_vae(spec: VaeSpec) -> dict[str, object]:
    """The same of the VAE's pixels a second."""
    return {"vae": asdict(spec)}


def _encode_masks(job: Job, wants: Mapping[str, MaskWant]) -> list[str]:
    """Put masks into the store; no model is needed -> what is wrong with those that could not be used."""
    bad = []
    with Writer(job.store) as writer:
        for want in wants.values():
            try:
                mask = masks.read_mask(want.image, want.placement, want.channel)
                identity.confirm(want.image, want.key["source"])
            except InputError as error:
                bad.append(str(error))
                continue
            writer.put("masks", want.key, mask, _made())
    return bad


def _latents_in_turn(
    job: Job, claims: Claims, spec: VaeSpec, wants: Mapping[str, LatentsWant]
) -> tuple[int, list[str]]:
    _, peak = vae.encoder_peak(spec, largest_of(wants.values()), job.budget_bytes)
    pace = figures.recall("pixels", pace_of_vae(spec))
    pixels = sum(prod(want.placement.crop[2:]) for want in wants.values())
    seconds = pixels / pace.per_second if pace else None
    return in_turn("VAE encoder", partial(_encode_latents, job, claims, spec, wants), job.say, peak, seconds)


def largest_of(wants: Iterable[LatentsWant]) -> tuple[int, int]:
    """Width and height of the largest picture."""
    return max((want.placement.crop[2:] for want in wants), key=prod)


def _encode_latents(job: Job, claims: Claims, spec: VaeSpec, wants: Mapping[str, LatentsWant]) -> tuple[int, list[str]]:
    """Encode pictures one at a time, those left out that another process has seen to or is at.

    -> How many, and what is wrong with those that could not be read.
    """
    encoder = vae.load_encoder(job.folders.root, job.folders.vae)
    rows = encoder.strip_rows(largest_of(wants.values()), job.budget_bytes)
    how = "pictures whole" if rows is None else f"in strips of {rows} rows where pictures are too large to go whole"
    say_loaded(f"VAE encoder (float32, {how})", job.say)
    keys, bad, pixels, started = list(wants), [], [], time.perf_counter()
    with tqdm(total=len(keys), desc="images", unit="image", dynamic_ncols=True) as bar:
        for some in (keys[first : first + _AT_ONCE] for first in range(0, len(keys), _AT_ONCE)):
            mine = claims.take(some)
            bar.update(len(some) - len(mine))
            with Writer(job.store) as writer:
                for key in mine:
                    bar.update()
                    claims.sign()
                    if job.store.has("latents", key):
                        continue
                    try:
                        latents = _latents_of(job, encoder, wants[key])
                    except RelayError as error:
                        bad.append(str(error) if isinstance(error, InputError) else f"{wants[key].image}: {error}")
                        continue
                    writer.put("latents", wants[key].key, latents, _made())
                    pixels.append(prod(wants[key].placement.crop[2:]))
            claims.release()  # now that they are in the store
    figures.note("pixels", pace_of_vae(spec), sum(pixels), time.perf_counter() - started)
    return len(pixels), bad


def _latents_of(job: Job, encoder: vae.Encoder, want: LatentsWant) -> np.ndarray:
    picture = images.read_pixels(want.image, want.placement, want.background)
    identity.confirm(want.image, want.key["source"])  # it may be hours since it was hashed
    return _stored(encoder.encode(mx.array(picture)[None], job.budget_bytes)[0], job.latents_dtype)


def _advance(bar: tqdm, claims: Claims, tokens: float) -> None:
    bar.update(min(tokens, bar.total - bar.n))  # shares of tokens may add up to a hair more
    claims.sign()


def _stored(array: mx.array, dtype: str) -> np.ndarray:
    """An array as the store takes it: bfloat16 as its bits."""
    if dtype == "bfloat16":
        return np.array(array.astype(mx.bfloat16).view(mx.uint16))
    return np.array(array.astype({"float16": mx.float16, "float32": mx.float32}[dtype]))


def _made() -> dict[str, object]:
    return {
        "version": version("flux2-relay"),
        "mlx": version("mlx"),
        "device": str(mx.default_device()),
        "at": datetime.now(UTC).isoformat(),
    }
