"""`relay import`: a config of another trainer as one of ours, and a list of what was not carried over and why.

Which tool a file is of is told by what stands in it, not by its name.
"""

import json
import shlex
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import commented, import_aitoolkit, import_flags, import_mflux, import_musubi
from flux2_relay.pipeline.cache_commands import print_json
from flux2_relay.pipeline.import_rules import Carried, Left
from flux2_relay.pipeline.labels import entry
from flux2_relay.stages.catalogue import CATALOGUE, SOURCES
from flux2_relay.stages.encode.captions import read_text

_MUSUBI, _AITOOLKIT, _MFLUX = "musubi-tuner", "ai-toolkit", "mflux"
_FALLBACK = "klein-base-4b"
_READERS = {".json": json.loads, ".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
_SIGNS = "--dit", "--network_module", "--dataset_config", "flux_2_train_network"


def run(file: Path, output: Path | None, flags: str | None, model: str | None, how: tuple[bool, bool]) -> None:
    """Read, translate, write, tell; `how` is force and as_json."""
    force, as_json = how
    carried = translate(file, flags)
    _complete(carried, model, file)
    path = output or Path(f"{file.stem}-relay.yaml")
    head = [f"From {file} of {carried.tool}, by `relay import`.", "", f"  relay plan -c {shlex.quote(str(path))}", ""]
    head += ["What is not here has its default; docs/config.md explains every key."]
    commented.save(path, commented.document(head, carried.lines()) + _appendix(carried.left), force)
    if as_json:
        values = {key: value for key, (value, _) in carried.values.items()}
        left = list(map(asdict, carried.left))
        print_json({"tool": carried.tool, "config": str(path), "carried": values, "left": left})
    else:
        _tell(path, carried)


def translate(file: Path, flags: str | None) -> Carried:
    """What of a file, and of the flags that go with it, has a counterpart here."""
    text = read_text(file.expanduser())
    tree = _parsed(text)
    carried = Carried(_tool(file, text, tree))
    if flags is not None and carried.tool != _MUSUBI:
        raise InputError(f"--flags belong to {_MUSUBI}; {file} is a config of {carried.tool}")
    try:
        if carried.tool == _MUSUBI:
            _musubi(file, text, tree, (flags, carried))
        elif isinstance(tree, Mapping):
            read = import_aitoolkit.read if carried.tool == _AITOOLKIT else import_mflux.read
            read(tree, file.parent, carried)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise InputError(
            f"{file}: it begins like a config of {carried.tool}, but some value in it has another shape than there "
            f"({type(error).__name__}: {error})"
        ) from error
    return carried


def _tool(file: Path, text: str, tree: object) -> str:
    keys = set(tree) if isinstance(tree, Mapping) else set()
    if isinstance(tree, Mapping) and isinstance(tree.get("config"), Mapping) and _processes(tree["config"]):
        return _AITOOLKIT
    if keys & {"training_loop", "lora_layers"}:
        return _MFLUX
    if keys & {"datasets", "general", "dit", "network_dim", "dataset_config"} or any(sign in text for sign in _SIGNS):
        return _MUSUBI
    raise InputError(
        f"{file}: this is no config that is known here: a data set's TOML or the training command of musubi-tuner, "
        f"ai-toolkit's YAML, or mflux's JSON{_syntax(file, text)}"
    )


def _syntax(file: Path, text: str) -> str:
    """What is wrong with a text of the kind that the file's name says, as a clause."""
    read = _READERS.get(file.suffix.lower())
    try:
        if read is not None:
            read(text)
    except (ValueError, yaml.YAMLError, RecursionError, OverflowError) as error:
        return f" (as {file.suffix[1:].upper()} it cannot be read: {' '.join(str(error).split())})"
    return ""


def _processes(config: Mapping[str, Any]) -> bool:
    processes = config.get("process")
    return isinstance(processes, list) and bool(processes) and isinstance(processes[0], Mapping)


def _parsed(text: str) -> object:
    """The value of a JSON, TOML or YAML text; None where it is none of these."""
    for read in (json.loads, tomllib.loads, yaml.safe_load):
        try:
            return read(text)
        except (ValueError, yaml.YAMLError, RecursionError, OverflowError):
            continue
    return None


def _musubi(file: Path, text: str, tree: object, into: tuple[str | None, Carried]) -> None:
    flags, carried = into
    given, data = _flags(flags) if flags is not None else {}, None
    if isinstance(tree, Mapping) and ("datasets" in tree or "general" in tree):
        data = tree
    else:
        given = {**(tree if isinstance(tree, Mapping) else import_flags.read_flags(text)), **given}
        named = given.get("dataset_config")
        data = _dataset(file, str(named), carried) if named else None
    if isinstance(data, Mapping):
        import_musubi.from_toml(data, carried)
    if given:
        import_musubi.from_flags(given, carried)
        import_musubi.finish(given, carried)


def _flags(flags: str) -> dict[str, object]:
    """Flags as they are written, or in a file: a shell script, or a TOML for --config_file."""
    path = Path(flags).expanduser()
    is_file = len(flags) < 1000 and "\n" not in flags and path.is_file()
    text = read_text(path) if is_file else flags
    tree = _parsed(text) if is_file else None
    found = dict(tree) if isinstance(tree, Mapping) else import_flags.read_flags(text)
    if not found:
        raise InputError(f"--flags: {flags!r} holds no flag such as --network_dim 32, and is no file that does")
    return {str(name): value for name, value in found.items()}


def _dataset(file: Path, named: str, carried: Carried) -> object:
    """The data set's TOML that a training command names, if it is here."""
    for place in (Path(named).expanduser(), file.parent / named):
        if place.is_file():
            tree = _parsed(read_text(place))
            return tree if isinstance(tree, Mapping) else None
    carried.leave("dataset_config", named, "it is not here; import it with --flags, or write `data` yourself")
    return None


def _complete(carried: Carried, model: str | None, file: Path) -> None:
    """Fill in what a config of ours must have."""
    if model is not None:
        carried.put("model.path", SOURCES[model].repository if model in CATALOGUE else model, "--model")
        carried.values.pop("model.name", None)
    name = carried.values.get("model.name", (None, ""))[0]
    if "model.path" not in carried.values:
        repository = SOURCES[str(name) if name in CATALOGUE else _FALLBACK].repository
        carried.put("model.path", repository, f"{file.name} names no model here: correct it")
    path = str(carried.values["model.path"][0])
    if path.endswith(".safetensors") and "model.tokenizer" not in carried.values:
        of = SOURCES[str(name) if name in CATALOGUE else _FALLBACK].repository
        carried.put("model.tokenizer", of, "a single file has no tokenizer: a folder or repository that has")
    for number in {key.split(".")[1] for key in carried.values if key.startswith("data.")}:
        if f"data.{number}.path" not in carried.values:
            carried.put(f"data.{number}.path", "data/my-pictures", f"{file.name} names no folder: correct it")


def _appendix(left: list[Left]) -> str:
    if not left:
        return ""
    lines = ["", "# Not carried over:"]
    for of in left:
        said = f"{of.key} = {of.value}: {of.why}"
        lines += textwrap.wrap(said, 98, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _tell(path: Path, carried: Carried) -> None:
    entry("config", f"{path}: {len(carried.values)} keys from {carried.tool}")
    for of in carried.left:
        click.echo()
        entry("left out", f"{of.key} = {of.value}")
        entry("", of.why)
    click.echo()
    entry("next", f"relay plan -c {shlex.quote(str(path))}")
