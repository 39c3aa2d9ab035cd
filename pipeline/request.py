"""What names a set: the part of a config that decides what stage one encodes, in plain values.

`encode` publishes its set under this request, `train` asks for the newest set with an equal one. Of a path only the
last part counts, so that a store may go to another machine where everything lies under another folder; the paths
themselves are told beside the set and decide between two sets of the same names. Keys hold no floats, and nothing in
here is one.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from flux2_relay.cache import Store
from flux2_relay.cache.errors import InputError, StoreError
from flux2_relay.cache.sets import SetRecord
from flux2_relay.pipeline.config import Config
from flux2_relay.stages.encode.companions import ALPHA
from flux2_relay.stages.encode.dataset import DataOptions, Sample, read_samples
from flux2_relay.stages.train.options import PromptOptions

SAMPLES = "sample"
"""What the request of a set has that `relay sample` made; no training asks for one."""
_LOOKED_AT = 8  # pictures compared with a set that was encoded from other folders


def set_request(config: Config) -> dict[str, object]:
    """The request of a config."""
    model = config.model
    parts = {"path": model.path, "text_encoder": model.text_encoder, "tokenizer": model.tokenizer, "vae": model.vae}
    return {
        "model": {key: None if path is None else _last(path) for key, path in parts.items()},
        "data": [_data(options) for options in config.data],
        "encode": {"bits": config.encode.bits},
        "cache": {"dtype": config.cache.dtype, "latents_dtype": config.cache.latents_dtype},
        "prompts": [_prompt(picture) for picture in config.previews.pictures()],
        # Only a random crop depends on the seed.
        "seed": config.run.seed if any(options.crop == "random" for options in config.data) else None,
    }


def data_paths(config: Config) -> list[str]:
    """The data folders and lists as this machine finds them: told beside a set, no part of its name."""
    return [_whole(options.path) for options in config.data]


def _whole(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())


def _last(path: str) -> str:
    """The last part of a path, of a repository id the name: what stays when a folder moves."""
    return Path(_whole(path)).name


def _prompt(picture: PromptOptions) -> list[object]:
    """What of a preview is encoded; its size only where it decides how large the references are."""
    names = [_last(path) for path in picture.references]
    return [picture.prompt, picture.negative or "", *([names, list(picture.size or ())] if names else [])]


def _data(options: DataOptions) -> dict[str, object]:
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()}
    masks = options.masks if options.masks in (None, ALPHA) else _last(options.masks)
    return {**values, "path": _last(options.path), "masks": masks, "references": list(map(_last, options.references))}


def find_set(store: Store, config: Config) -> SetRecord:
    """The newest set that answers to this config; InputError says what the nearest one differs in.

    One that was encoded from these very folders goes before one from folders of the same names, and that only counts
    if it does not contradict the pictures here, as far as they are here.
    """
    request, paths = set_request(config), data_paths(config)
    records = [record for record in store.sets() if SAMPLES not in record.body.get("request", {})]
    same = [record for record in records if record.body.get("request") == request]
    others = [record for record in same if record.made.get("paths") != paths]
    for record in same:
        if record not in others:
            return record
    samples = _samples_here(config) if others else ()
    for record in others:
        if not _contradicts(store, record, samples):
            return record
    raise InputError(f"{store.name}: {_why_none(records, request, others)}. Run `relay encode` with this config first.")


def _samples_here(config: Config) -> tuple[Sample, ...]:
    """The data set, if it is on this machine."""
    try:
        return read_samples(config.data)
    except InputError:
        return ()


def _contradicts(store: Store, record: SetRecord, samples: tuple[Sample, ...]) -> bool:
    """Whether a set is of other pictures or captions than `samples`; some of them are looked at closely."""
    if not samples:
        return False
    listed = {sample["id"]: sample for sample in record.body["samples"]}
    if {sample.id for sample in samples} != listed.keys():
        return True
    return any(not _is_same(store, sample, listed[sample.id]) for sample in islice(_spread(samples), _LOOKED_AT))


def _spread(samples: tuple[Sample, ...]) -> Iterator[Sample]:
    return iter(samples[:: max(1, len(samples) // _LOOKED_AT)])


def _is_same(store: Store, sample: Sample, listed: Mapping[str, Any]) -> bool:
    """Whether a set's sample has the bytes of the picture and the captions that are here."""
    from flux2_relay.stages import identity

    try:
        captions = [store.header("text", key).attributes["key"]["caption"] for key in listed["text"]]
        sources = {store.header("latents", of["key"]).attributes["key"]["source"] for of in listed["latents"]}
        return captions == list(sample.captions) and sources == {identity.file_sha256(sample.image)}
    except (StoreError, OSError):
        return True  # what is missing is said by others, with what to do


def _why_none(records: list[SetRecord], request: Mapping[str, object], others: list[SetRecord]) -> str:
    if not records:
        return "nothing has been encoded into this store"
    if others:
        there = ", ".join(others[0].made.get("paths", ())) or "other folders"
        return f"a set of this config's names is there, but of other pictures or captions (encoded from {there})"
    differing = min((_differences(record.body.get("request", {}), request) for record in records), key=len)
    return "no set in this store was encoded for this config; the nearest differs in " + "; ".join(differing)


def _differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    lines = []
    for key, value in wanted.items():
        other = found.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            lines += [
                f"{key}.{inner} ({other.get(inner)!r} there, {value[inner]!r} here)"
                for inner in value
                if other.get(inner) != value[inner]
            ]
        elif isinstance(value, list) and isinstance(other, list) and key == "data" and len(value) == len(other):
            for place, (there, here) in enumerate(zip(other, value, strict=True)):
                prefix = key if len(value) == 1 else f"{key}.{place}"
                lines += [f"{prefix}.{line}" for line in _differences(there, here)]
        elif other != value:
            is_long = isinstance(value, list) and key == "prompts"
            lines.append(key if is_long else f"{key} ({other!r} there, {value!r} here)")
    return lines
