"""Why an entry does not fit: two keys compared in words, and the nearest entry that is there."""

from collections.abc import Iterator, Mapping

from flux2_relay.cache.errors import StoreError
from flux2_relay.cache.store import Store

_WORDS = {
    "format": "format of such entries",
    "encoder": "text encoder weights",
    "tokenizer": "tokenizer",
    "template": "prompt template",
    "taps": "layers whose outputs are kept",
    "max_length": "length in tokens",
    "rows": "rows stored",
    "quant": "quantization of the encoder",
    "compute": "type computed in",
    "dtype": "type stored",
    "numerics": "version of the numerics",
    "vae": "VAE weights",
    "source": "image file",
    "decode": "version of image decoding",
    "background": "background of transparent pixels",
    "resize": "size resized to",
    "crop": "crop",
    "flip": "mirroring",
    "tf32": "TF32",
}
_SUBJECT = {"text": "caption", "latents": "source", "masks": "source"}
"""What an entry is of: the part of its key that another model or option leaves as it is."""

_NEITHER = object()


def explain(wanted: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """Compare two key objects -> a line for each part that differs: what `found` has, what is `wanted`."""
    parts = [*wanted, *(part for part in found if part not in wanted)]
    return [
        f"{_WORDS.get(part, part)}: {_brief(found.get(part, _NEITHER))} there, "
        f"{_brief(wanted.get(part, _NEITHER))} wanted"
        for part in parts
        if wanted.get(part, _NEITHER) != found.get(part, _NEITHER)
    ]


def in_words(key_object: Mapping[str, object]) -> list[str]:
    """Describe a key object -> a line for each part, for `relay cache show`."""
    return [f"{_WORDS.get(part, part)}: {_brief(value)}" for part, value in key_object.items()]


def key_objects(store: Store, kind: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Read the key object of every sound entry of a kind, one small file each -> (key, key object)."""
    for key in store.keys(kind):
        try:
            yield key, store.header(kind, key).attributes["key"]
        except StoreError:
            continue  # damaged, or gone since the scan


def nearest(
    wanted: Mapping[str, object], candidates: Mapping[str, Mapping[str, object]]
) -> tuple[str, list[str]] | None:
    """Find the entry that differs least from the one wanted -> (key, differing parts in words).

    Only entries of the same caption or the same image come into question, so None means that this one is new.
    `candidates`: `dict(key_objects(store, kind))`, read once for many questions.
    """
    subject = _SUBJECT.get(str(wanted.get("kind")))
    if subject is None:
        return None
    same = [
        (key, explain(wanted, found))
        for key, found in candidates.items()
        if found.get("kind") == wanted.get("kind") and found.get(subject) == wanted.get(subject)
    ]
    return min(same, key=lambda item: (len(item[1]), item[0]), default=None)


def _brief(value: object) -> str:
    if value is _NEITHER:
        return "nothing"
    if isinstance(value, str):
        is_hash = len(value) == 64 and all(digit in "0123456789abcdef" for digit in value)
        return value[:12] if is_hash else repr(value)
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_brief(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(_brief(part) for part in value)
    return "none" if value is None else str(value)
