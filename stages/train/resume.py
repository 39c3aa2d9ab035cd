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


def check(folder: Path, config: Values, data: str, ranks: int = 1) -> list[str]:
    """Sentences on what differs from the newest checkpoint of the run in `folder`; InputError where that is too much.

    `config` is key -> plain value, `data` as of `digest_of_data`, `ranks` how many processes train. Reads no tensor.
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
    return _sentences(state, config, changed) + _about_ranks(state, config, ranks)


def _about_ranks(state: checkpoint.State, config: Values, ranks: int) -> list[str]:
    """What another number of ranks means for the items of a step."""
    if ranks == state.ranks:
        return []
    now = _items(_as_json(config), ranks)
    then = _items({**_as_json(config), **state.config}, state.ranks)
    said = f"ranks were {state.ranks} and are {ranks} now (since step {state.step})"
    if now == then:
        return [f"{said}; a step is of {now} items as before"]
    return [
        f"warning: {said}, and a step is of {now} items where it was of {then}: what follows is not what would have "
        "followed. train.accumulate x ranks x train.batch is that number"
    ]


def _items(config: Values, ranks: int) -> int:
    """Items of a step, over accumulation and ranks."""
    counts = config["train.batch"], config["train.accumulate"]
    assert isinstance(counts[0], int)
    assert isinstance(counts[1], int)
    return counts[0] * counts[1] * ranks


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
