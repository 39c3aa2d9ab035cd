"""Several runs from one config: every combination of the values in its `sweep` section and in `--sweep`.

Each run is an ordinary config with a name of its own: that of the base and the values that it varies, as in
`fox-rank8-lr1e-4`. Several configs make a list of runs; each is spread in the same way.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import yaml
from yaml.nodes import ScalarNode, SequenceNode

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import schema
from flux2_relay.pipeline.config import Config, Varied, load_config

_LONGEST = 40  # characters of a value in a folder's name
_NAME = "run.name"


def expand(paths: Sequence[Path], settings: Sequence[str], sweeps: Sequence[str]) -> list[Config]:
    """The configs of all runs, in the order of the files and then of the values, the last key varying fastest.

    `settings` are those of `--set`, `sweeps` those of `--sweep` (`key.path=value,value`), which replace the same keys
    of a `sweep` section. InputError names every fault of any of them, and runs that would share a folder.
    """
    chosen = dict(map(read, sweeps))
    runs = [config for path in paths for config in _of_file(path, settings, chosen)]
    folders = Counter(str(config.run.folder) for config in runs)
    shared = [folder for folder, count in folders.items() if count > 1]
    if shared:
        raise InputError(
            f"several runs would have the same folder: {', '.join(shared)}; give each config a run.name of its own, "
            "and each swept key values that differ"
        )
    return runs


def read(sweep: str) -> tuple[str, tuple[str, ...]]:
    """Key and values of one `--sweep`, each value as text of YAML: lists in brackets, text with commas in quotes."""
    origin = f"--sweep {sweep}"
    key, _, text = sweep.partition("=")
    node = schema.compose(f"[{text}]", origin)
    values = tuple(map(_text, node.value)) if isinstance(node, SequenceNode) else ()
    if not values or not all(key.strip().split(".")) or key.strip().partition(".")[0] == "sweep":
        raise InputError(f"{origin}: write it as key.path=value,value, for example --sweep lora.rank=8,16")
    return key.strip(), values


def _text(node: yaml.Node) -> str:
    if isinstance(node, ScalarNode):
        return node.value if node.style is None else json.dumps(node.value, ensure_ascii=False)
    return yaml.serialize(node, width=10**6).strip()


def _of_file(path: Path, settings: Sequence[str], chosen: Mapping[str, Sequence[str]]) -> Iterator[Config]:
    base = load_config(path, settings)
    varied = {key: [_written(value) for value in values] for key, values in base.sweep.items()} | dict(chosen)
    if not varied:
        yield base
        return
    faults: dict[str, None] = {}
    for values in product(*varied.values()):
        of_run = dict(zip(varied, values, strict=True))
        name = name_of(of_run.get(_NAME, base.run.name), {key: v for key, v in of_run.items() if key != _NAME})
        changes = [f"{key}={value}" for key, value in of_run.items() if key != _NAME]
        try:
            yield load_config(path, [*settings, *changes, "sweep={}", f"{_NAME}={json.dumps(name)}"])
        except InputError as error:
            faults |= dict.fromkeys(str(error).replace("--set ", "sweep of ").splitlines())
    if faults:
        raise InputError("\n".join(faults))


def _written(value: Varied) -> str:
    """A value of a `sweep` section as text of YAML."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def name_of(base: str, varied: Mapping[str, str]) -> str:
    """The name of a run: that of the base, and each varied key's last word with its value."""
    leaves = Counter(key.rpartition(".")[2] for key in varied)
    parts = [base]
    for key, value in varied.items():
        leaf = key.rpartition(".")[2]
        parts.append(_part(leaf if leaves[leaf] == 1 else key, value))
    return "-".join(parts)


def _part(leaf: str, value: str) -> str:
    short = re.sub(r"[^\w.+-]+", "-", value).strip("-")[:_LONGEST].rstrip("-")
    return f"{leaf}{short}" if short[:1].isdigit() else f"{leaf}-{short or 'empty'}"
