"""Whether a run can go on under the config and data that it is given now, and what to say of the changes."""

import json
from collections.abc import Mapping
from pathlib import Path

from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import key_of
from flux2_relay.stages.train import checkpoint
from flux2_relay.stages.weights import listing

Values = Mapping[str, object]

_REFUSED = ("run.seed", "lora.", "train.optimizer", "validation.fraction")
"""Keys that make another run: other adapters, another order, a state that does not fit, pictures seen already."""
_FREE = (
    *("run.name", "run.dir", "train.steps", "memory.", "save.", "previews.", "validation.every", "log."),
    *("model.name", "model.text_encoder", "model.tokenizer", "model.vae", "encode.", "cache."),
    "data",  # what matters of it is in the digest of the set
)
"""Keys that change nothing about the steps to come, or nothing that is not meant to change."""


def digest_of_data(body: Mapping[str, object]) -> str:
    """A name for all that training reads of a set; prompts of previews may come and go."""
    return key_of({"shared": body["shared"], "samples": body["samples"]})


def check(folder: Path, config: Values, data: str) -> list[str]:
    """Sentences on what differs from the newest checkpoint of the run in `folder`; InputError where that is too much.

    `config` is key -> plain value, `data` as of `digest_of_data`. Reads no tensor.
    """
    state = _newest(folder / "checkpoints")
    if state is None:
        return []
    changed = _changes(state.config, config)
    faults = [_words(key, state.config, config) for key in changed if _is_among(key, _REFUSED)]
    if state.data != data:
        faults.append("the data set (pictures, captions or how they were encoded) is another now")
    if faults:
        title = (
            f"{folder} cannot be resumed from step {state.step}; go back to what it was, or choose another run.name:"
        )
        raise InputError(listing(title, faults))
    return _sentences(state, config, changed)


def _sentences(state: checkpoint.State, config: Values, changed: list[str]) -> list[str]:
    free = [key for key in changed if _is_among(key, _FREE)]
    others = [key for key in changed if key not in free]
    sentences = [f"changed since step {state.step}: {_words(key, state.config, config)}" for key in free]
    sentences += [
        f"changed since step {state.step}, and holds from here on: {_words(key, state.config, config)}"
        for key in others
    ]
    if "train.steps" in changed and config.get("train.schedule") != "constant":
        sentences.append(f"train.schedule {config['train.schedule']} reaches its end with the new train.steps")
    return sentences


def _newest(folder: Path) -> checkpoint.State | None:
    for place in reversed(checkpoint.saved(folder)):
        try:
            return checkpoint.load_state(place)
        except InputError:  # the loop names it when it takes up the one before
            continue
    return None


def _changes(then: Values, now: Values) -> list[str]:
    """The keys whose values differ, in the order of the config; keys of another release of this program aside."""
    return [key for key, value in _as_json(now).items() if key in then and then[key] != value]


def _as_json(values: Values) -> dict[str, object]:
    return json.loads(json.dumps(dict(values)))


def _words(key: str, then: Values, now: Values) -> str:
    return f"{key} was {_word(then[key])} and is {_word(_as_json(now)[key])} now"


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_among(key: str, names: tuple[str, ...]) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)
