"""What stage one puts into the store for a data set: every entry it needs, and the set that lists them.

All keys are known before any model is loaded: they follow from the files' bytes, the options and the identities of
the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import key_of
from flux2_relay.stages import identity
from flux2_relay.stages.encode import images
from flux2_relay.stages.encode.dataset import Sample
from flux2_relay.stages.encode.images import Placement
from flux2_relay.stages.encode.layers import GROUP
from flux2_relay.stages.encode.packed import Packing
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One preview prompt, as far as stage one is concerned."""

    text: str
    negative: str
    size: tuple[int, int]
    seed: int


@dataclass(slots=True)
class Wanted:
    """The entries of a set by key, and the set's own lists."""

    text: dict[str, Mapping[str, object]] = field(default_factory=dict)
    latents: dict[str, LatentsWant] = field(default_factory=dict)
    shared: dict[str, str | None] = field(default_factory=dict)
    samples: list[dict[str, object]] = field(default_factory=list)
    prompts: list[dict[str, object]] = field(default_factory=list)

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
    faults = []
    for sample in samples:
        try:
            of_sample = [want.add_latents(w) for w in _latents_of(sample, latents, seed)]
        except InputError as error:
            faults.append(str(error))
            continue
        want.samples.append(_sample(sample, [want.add_text(text.key(c)) for c in sample.captions], of_sample, want))
    if faults:
        raise InputError(listing("these pictures cannot be used:", faults))
    for prompt in prompts:
        want.prompts.append(
            {
                "text": want.add_text(text.key(prompt.text)),
                "negative": want.add_text(text.key(prompt.negative)),
                "references": [],
                "size": list(prompt.size),
                "seed": prompt.seed,
            }
        )
    return want


def _latents_of(sample: Sample, latents: LatentsIdentity, seed: int) -> list[LatentsWant]:
    """One want for each resolution, and a second for its mirror image where `flip` says so."""
    options = sample.options
    header, source = images.read_header(sample.image), identity.file_sha256(sample.image)
    wants = []
    for resolution in options.resolutions:
        bucket = images.choose_bucket(header.width, header.height, resolution, options.upscale)
        for flip in (False, True) if options.flip else (False,):
            draw = images.crop_draw(seed, source)
            placement = images.place((header.width, header.height), bucket, options.crop, flip, draw)
            background = options.background_hex() if header.transparent else None
            key = images.latents_key(
                source, placement, background, vae=latents.vae, tf32=latents.tf32, dtype=latents.dtype
            )
            wants.append(LatentsWant(key, sample.image, placement, options.background_hex()))
    return wants


def _sample(sample: Sample, texts: list[str], latents: list[str], want: Wanted) -> dict[str, object]:
    """A sample as the set lists it; h and w are in tokens."""
    entries = []
    for key in dict.fromkeys(latents):  # two resolutions may meet in one bucket where a picture is small
        _, _, width, height = want.latents[key].placement.crop
        size = {"h": height // images.STEP, "w": width // images.STEP}
        entries.append({"key": key, **size, "references": [], "mask": None})
    return {"id": sample.id, "text": texts, "latents": entries, "repeats": sample.options.repeats, "prior": False}
