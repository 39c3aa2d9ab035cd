"""What a config wants of a store, entry by entry: there, missing, or stale and why."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux2_relay.cache import Store, explain
from flux2_relay.cache.keys import key_of
from flux2_relay.cache.sets import SetRecord

Keys = Mapping[str, Mapping[str, object]]
"""Key -> key object."""

_SUBJECT = {"text": "caption", "latents": "source", "masks": "source"}
_CHANGED = {"text": "caption changed", "latents": "picture changed", "masks": "mask changed"}
_LONG = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """The entries of one kind."""

    wanted: int
    present: int
    unknown: int
    """Cannot be told, since the text encoder's weights were not hashed here."""
    likely: int
    """Of those: there for some text encoder."""
    missing: tuple[str, ...]
    """Keys that are not there, as far as can be told."""
    stale: Mapping[str, int]
    """Of the missing: what has changed -> how many; the others are new."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of a store about one kind of entry."""

    kind: str
    wanted: Keys
    is_open: bool = False
    """The keys lack the identity of the text encoder's weights."""
    replaced: Collection[str] = ()
    """Keys that stand where the last set had others for the same picture."""


def compare(store: Store | None, asked: Question) -> Entries:
    """What is there of the wanted entries; `store` None holds nothing."""
    wanted, kind = asked.wanted, asked.kind
    there = store.keys(kind) if store is not None else set()
    missing = [key for key in wanted if key not in there]
    candidates = dict(explain.key_objects(store, kind)) if store is not None and missing else {}
    likely: set[str] = set()
    if asked.is_open:
        known = {_without_encoder(key_object) for key_object in candidates.values()}
        likely = {key for key in missing if _without_encoder(wanted[key]) in known}
    lacking = tuple(key for key in missing if key not in likely)
    return Entries(
        wanted=len(wanted),
        present=len(wanted) - len(missing),
        unknown=len(missing) if asked.is_open else 0,
        likely=len(likely),
        missing=lacking,
        stale=dict(Counter(filter(None, _reasons(asked, lacking, candidates))).most_common()),
    )


def _without_encoder(key_object: Mapping[str, object]) -> str:
    return key_of({**key_object, "encoder": None})


def _reasons(asked: Question, lacking: Sequence[str], candidates: Keys) -> Iterator[str]:
    """For each missing key what has changed since the nearest entry was made; "" for one that is new."""
    subject = _SUBJECT[asked.kind]
    alike: dict[object, dict[str, Mapping[str, object]]] = {}
    for key, key_object in candidates.items():
        alike.setdefault(key_object.get(subject), {})[key] = key_object
    for key in lacking:
        near = explain.nearest(asked.wanted[key], alike.get(asked.wanted[key].get(subject), {}))
        if near is not None:
            parts = (_part(line, asked.kind == "text") for line in near[1] if not _is_open(line, asked))
            yield ", ".join(parts)
        else:
            yield _CHANGED[asked.kind] if key in asked.replaced else ""


def _is_open(line: str, asked: Question) -> bool:
    return asked.is_open and line.startswith("text encoder weights")


def _part(line: str, with_values: bool) -> str:
    """What differs; values only where they are the same for all entries and say something."""
    name, _, values = line.partition(": ")
    there, _, here = values.removesuffix(" wanted").partition(" there, ")
    says_something = with_values and not any(_is_hash(value) or len(value) > _LONG for value in (there, here))
    return f"{name} ({there}, now {here})" if says_something else name


def _is_hash(text: str) -> bool:
    return len(text) == 12 and all(digit in "0123456789abcdef" for digit in text)


def replaced(samples: Iterable[Mapping[str, Any]], previous: SetRecord | None) -> set[str]:
    """Keys of `samples` that the last set did not have for the sample of the same id."""
    if previous is None:
        return set()
    before = {sample["id"]: set(_keys_of(sample)) for sample in previous.body["samples"]}
    return {key for sample in samples for key in _keys_of(sample) if key not in before.get(sample["id"], (key,))}


def _keys_of(sample: Mapping[str, Any]) -> Iterator[str]:
    yield from sample["text"]
    for latents in sample["latents"]:
        yield latents["key"]
        yield from filter(None, [latents["mask"]])
