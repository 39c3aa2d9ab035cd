"""What names a set: the part of a config that decides what stage one encodes, in plain values.

`encode` publishes its set under this request, `train` asks for the newest set with an equal one. Keys hold no
floats, and nothing in here is one.
"""

from collections.abc import Mapping
from dataclasses import asdict

from flux2_relay.cache import Store
from flux2_relay.cache.errors import InputError
from flux2_relay.cache.sets import SetRecord
from flux2_relay.pipeline.config import Config
from flux2_relay.stages.train.options import PromptOptions


def set_request(config: Config) -> dict[str, object]:
    """The request of a config."""
    return {
        "model": {key: value for key, value in asdict(config.model).items() if key != "name"},
        "data": [_data(options) for options in map(asdict, config.data)],
        "encode": {"bits": config.encode.bits},
        "cache": {"dtype": config.cache.dtype, "latents_dtype": config.cache.latents_dtype},
        "prompts": [_prompt(picture) for picture in config.previews.pictures()],
        # Only a random crop depends on the seed.
        "seed": config.run.seed if any(options.crop == "random" for options in config.data) else None,
    }


def _prompt(picture: PromptOptions) -> list[object]:
    """What of a preview is encoded; its size only where it decides how large the references are."""
    of_references = [list(picture.references), list(picture.size or ())] if picture.references else []
    return [picture.prompt, picture.negative or "", *of_references]


def _data(options: Mapping[str, object]) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}


def find_set(store: Store, config: Config) -> SetRecord:
    """The newest set that answers to this config; InputError says what the nearest one differs in."""
    request = set_request(config)
    records = store.sets()
    for record in records:
        if record.body.get("request") == request:
            return record
    raise InputError(f"{store.name}: {_why_none(records, request)}. Run `relay encode` with this config first.")


def _why_none(records: list[SetRecord], request: Mapping[str, object]) -> str:
    if not records:
        return "nothing has been encoded into this store"
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
        elif other != value:
            lines.append(key if isinstance(value, list) else f"{key} ({other!r} there, {value!r} here)")
    return lines
