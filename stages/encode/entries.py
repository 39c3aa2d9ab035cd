"""What stage one puts into the store for a data set: every entry it needs, and the set that lists them.

All keys are known before any model is loaded: they follow from the files' bytes, the options and the identities of
the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any

from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import key_of
from flux2_relay.stages import identity
from flux2_relay.stages.encode import images, masks
from flux2_relay.stages.encode.companions import ALPHA
from flux2_relay.stages.encode.dataset import Sample
from flux2_relay.stages.encode.encoder_weights import GROUP
from flux2_relay.stages.encode.images import Placement
from flux2_relay.stages.packed import Packing
from flux2_relay.stages.weights import listing

TEXT_NUMERICS = 1  # part of every text key: raise it when the encoder's own code changes its numbers on purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class TextIdentity:
    """Everything that all text entries of a run have in common."""

    encoder: str
    tokenizer: str
    template: str
    taps: tuple[int, ...]
    length: int
    bits: int
    packing: Packing | None = None  # of an encoder that is packed on disk: then `bits` says only how it computes
    dtype: str  # of the stored rows
    shares_rows: bool

    def key(self, caption: str | None, rows: str | None = None) -> dict[str, object]:
        """The key object of a caption's entry, or of the shared `prefix` or `pad` rows (then `caption` is None)."""
        return {
            "kind": "text",
            "format": 1,
            "encoder": self.encoder,
            "tokenizer": self.tokenizer,
            "template": self.template,
            "taps": list(self.taps),
            "max_length": self.length,
            "rows": rows or ("own" if self.shares_rows else "all"),
            "quant": self._quant(),
            "compute": "float32" if self.bits == 32 else "bfloat16",
            "dtype": self.dtype,
            "numerics": TEXT_NUMERICS,
            "caption": caption,
        }

    def _quant(self) -> dict[str, object] | None:
        """How most of the weights are quantized; that of a packed file is told in full by the encoder's identity."""
        if self.packing is not None:
            packing = self.packing
            return {"bits": packing.bits, "group": packing.group_size, "mode": packing.mode, "source": "file"}
        return None if self.bits >= 16 else {"bits": self.bits, "group": GROUP, "mode": "affine"}


@dataclass(frozen=True, slots=True)
class LatentsWant:
    """One picture in one bucket, to be encoded from `image`."""

    key: Mapping[str, object]
    image: Path
    placement: Placement
    background: str
    size: images.Size  # of the whole picture


@dataclass(frozen=True, slots=True)
class MaskWant:
    """The mask of one picture in one bucket, to be read from `image`."""

    key: Mapping[str, object]
    image: Path
    placement: Placement
    channel: masks.Channel


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One preview prompt, as far as stage one is concerned."""

    text: str
    negative: str
    size: tuple[int, int]
    seed: int
    references: tuple[Path, ...] = ()


@dataclass(slots=True)
class Wanted:
    """The entries of a set by key, and the set's own lists."""

    text: dict[str, Mapping[str, object]] = field(default_factory=dict)
    latents: dict[str, LatentsWant] = field(default_factory=dict)
    masks: dict[str, MaskWant] = field(default_factory=dict)
    shared: dict[str, str | None] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)

    def add_text(self, key_object: Mapping[str, object]) -> str:
        """Want a text entry -> its key."""
        key = key_of(key_object)
        self.text[key] = key_object
        return key

    def add_latents(self, want: LatentsWant) -> str:
        """Want the latents of a picture -> their key."""
        key = key_of(want.key)
        self.latents[key] = want
        return key

    def add_mask(self, want: MaskWant) -> str:
        """Want a mask -> its key."""
        key = key_of(want.key)
        self.masks[key] = want
        return key


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsIdentity:
    """Everything that all latents of a run have in common."""

    vae: str
    tf32: bool
    dtype: str


def wanted(
    samples: Sequence[Sample], prompts: Sequence[Prompt], text: TextIdentity, latents: LatentsIdentity, seed: int
) -> Wanted:
    """Every entry for these samples and prompts; one InputError names all pictures that cannot be used."""
    want = Wanted()
    want.shared["empty"] = want.add_text(text.key(""))  # caption dropout, negative prompt and preview at once
    for rows in ("prefix", "pad"):
        want.shared[rows] = want.add_text(text.key(None, rows)) if text.shares_rows else None
    with identity.Findings() as findings:
        faults = _add_samples(want, samples, text, _Placer(latents, seed, findings))
        faults += _add_prompts(want, prompts, text, _Placer(latents, seed, findings))
    if faults:
        raise InputError(listing("these pictures cannot be used:", faults))
    return want


def _add_samples(want: Wanted, samples: Sequence[Sample], text: TextIdentity, placer: "_Placer") -> list[str]:
    """Want all of these samples -> what is wrong with pictures."""
    faults = []
    for sample in samples:
        try:
            of_sample = placer.latents(sample, want)
        except InputError as error:
            faults.append(str(error))
            continue
        texts = [want.add_text(text.key(caption)) for caption in sample.captions]
        options = sample.options
        want.samples.append(
            {"id": sample.id, "text": texts, "latents": of_sample, "repeats": options.repeats, "prior": options.prior}
        )
    return faults


def _add_prompts(want: Wanted, prompts: Sequence[Prompt], text: TextIdentity, placer: "_Placer") -> list[str]:
    faults = []
    for prompt in prompts:
        try:
            references = [want.add_latents(w) for w in placer.references(prompt)]
        except InputError as error:
            faults.append(str(error))
            continue
        keys = {"text": want.add_text(text.key(prompt.text)), "negative": want.add_text(text.key(prompt.negative))}
        want.prompts.append({**keys, "references": references, "size": list(prompt.size), "seed": prompt.seed})
    return faults


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image file as the keys see it: header and sha256 of the bytes."""

    path: Path
    header: images.Header
    source: str

    @property
    def size(self) -> images.Size:
        return self.header.width, self.header.height


@dataclass(frozen=True, slots=True)
class _Placer:
    """Cuts pictures to buckets: from files and options to what is wanted of them."""

    models: LatentsIdentity
    seed: int
    findings: identity.Findings

    def picture(self, path: Path) -> _Picture:
        """A file's header and hash, from memory where it is unchanged."""
        try:
            told = self.findings.recall(path, f"header {images.DECODE}", _header)
            width, height, transparent = map(int, told.split())
            header = images.Header(width=width, height=height, transparent=bool(transparent))
            return _Picture(path, header, self.findings.sha256(path))
        except OSError as error:
            reason = str(error.strerror).lower()
            raise InputError(f"{path}: {reason}; correct the path or the file's permissions") from None

    def latents(self, sample: Sample, want: Wanted) -> list[dict[str, Any]]:
        """What the set lists of a sample: an entry for each resolution, a second for its mirror image with `flip`."""
        options = sample.options
        picture, *references = pictures = [self.picture(path) for path in (sample.image, *sample.references)]
        mask = self.mask(sample, picture)
        draw = images.crop_draw(self.seed, picture.source)  # of references too: they are cut like their picture
        listed: dict[tuple[str, ...], dict[str, Any]] = {}  # two resolutions may meet in one bucket
        for resolution, flip in product(options.resolutions, (False, True) if options.flip else (False,)):
            buckets = [images.choose_bucket(*of.size, resolution, options.upscale) for of in pictures]
            placements = [
                images.place(of.size, bucket, options.crop, flip, draw)
                for of, bucket in zip(pictures, buckets, strict=True)
            ]
            placed = zip(pictures, placements, strict=True)
            key, *others = [want.add_latents(self.want(*one, options.background_hex())) for one in placed]
            sizes = [{"h": height // images.STEP, "w": width // images.STEP} for width, height in buckets]
            entry = {"key": key, **sizes[0], "references": others, "mask": None}
            if mask:
                entry["mask"] = want.add_mask(_mask_want(*mask, placements[0]))
            if references:  # so that batches can be put together without opening an array
                entry["reference_sizes"] = [[*size.values()] for size in sizes[1:]]
            listed[key, *others] = entry
        return list(listed.values())

    def mask(self, sample: Sample, picture: _Picture) -> tuple[_Picture, masks.Channel] | None:
        """Where the mask of a sample is read from; an opaque picture has none in its alpha channel."""
        if sample.options.masks == ALPHA:
            return (picture, "alpha") if picture.header.transparent else None
        if sample.mask is None:
            return None
        mask = self.picture(sample.mask)
        masks.check_shape(sample.mask, mask.size, picture.size)
        return mask, "grey"

    def references(self, prompt: Prompt) -> list[LatentsWant]:
        """The references of a preview, each in its own bucket of at most the preview's area."""
        wants = []
        for of in map(self.picture, prompt.references):
            bucket = images.choose_bucket(*of.size, isqrt(prompt.size[0] * prompt.size[1]), upscale=False)
            wants.append(self.want(of, images.place(of.size, bucket), "#ffffff"))
        return wants

    def want(self, of: _Picture, placement: Placement, background: str) -> LatentsWant:
        """A picture in one bucket."""
        told, known = background if of.header.transparent else None, self.models
        key = images.latents_key(of.source, placement, told, vae=known.vae, tf32=known.tf32, dtype=known.dtype)
        return LatentsWant(key, of.path, placement, background, of.size)


def _header(path: Path) -> str:
    header = images.read_header(path)
    return f"{header.width} {header.height} {header.transparent:d}"


def _mask_want(of: _Picture, channel: masks.Channel, placement: Placement) -> MaskWant:
    return MaskWant(masks.mask_key(of.source, placement, channel), of.path, placement, channel)
