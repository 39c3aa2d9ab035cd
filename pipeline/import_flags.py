"""`relay import`: musubi-tuner's flags from a command line or a script, and its files of prompts."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from flux2_relay.pipeline.import_rules import Carried

_SEVERAL = "network_args", "optimizer_args", "lr_scheduler_args"


def read_flags(text: str) -> dict[str, object]:
    """`--name value` from a command line or a shell script: numbers as numbers, a bare flag as True.

    Only a few flags take several values; other words are the script and the program that it starts.
    """
    flags: dict[str, object] = {}
    name = None
    for word in _words(text):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags[name] = _value(value) if equals else True
            name = None if equals else name
        elif name is not None and (flags[name] is True or name in _SEVERAL):
            flags[name] = _with(flags[name], word)
    return flags


def _words(text: str) -> list[str]:
    joined = text.replace("\\\n", " ").replace("\\\r\n", " ").replace("^\n", " ")
    joined = _filled_in(joined)
    try:
        return shlex.split(joined, comments=True)
    except ValueError:  # a quote that nobody closes
        return joined.split()


_SET = re.compile(
    r"""(?m)^[ \t]*(?:export[ \t]+|set[ \t]+)?([A-Za-z_]\w*)=("[^"\n]*"|'[^'\n]*'|[^\s"';&|]*)[ \t]*;?[ \t]*$"""
)
_USED = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?::-([^}]*))?\}|([A-Za-z_]\w*))|%([A-Za-z_]\w*)%")
_NESTED = 5  # variables that are made of others


def _filled_in(script: str) -> str:
    """A script with the variables that it sets itself, or has a default for, in place of their names."""
    known = {name: value.strip("\"'") for name, value in _SET.findall(script)}

    def value(of: re.Match[str]) -> str:
        return known.get(of[1] or of[3] or of[4]) or of[2] or of[0]

    for _ in range(_NESTED):
        script = _USED.sub(value, script)
    return script


def _with(before: object, word: str) -> object:
    """A flag's value with one more word behind it."""
    if before is True:
        return _value(word)
    return [*(before if isinstance(before, list) else [before]), word]


def _value(word: str) -> object:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


_OPTION = re.compile(r"\s--(w|h|d|s|g|l|n|ci|f|fs|i)\s+")
_OF_PROMPT = {"d": "seed", "s": "steps", "l": "guidance", "n": "negative"}


def put_prompts(path: Path, carried: Carried) -> None:
    """A file with a prompt a line and options behind it."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        carried.leave("sample_prompts", path, "the file is not here; write its prompts under previews.prompts")
        return
    prompts = [_prompt(line) for line in map(str.strip, lines) if line and not line.startswith("#")]
    carried.put("previews.prompts", prompts, f"musubi-tuner: {path.name}", "sample_prompts")


def _prompt(line: str) -> object:
    prompt, *rest = _OPTION.split(" " + line)
    options = dict(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))
    entry: dict[str, object] = {"prompt": prompt.strip()}
    if "w" in options or "h" in options:
        sides: Sequence[object] = [_value(options.get(side, "512")) for side in "wh"]
        entry["size"] = [max(16, round(side / 16) * 16) for side in sides if isinstance(side, int)]
    entry |= {ours: _value(options[theirs]) for theirs, ours in _OF_PROMPT.items() if theirs in options}
    if "g" in options and "l" not in options:
        entry["guidance"] = _value(options["g"])
    if "ci" in options:
        entry["references"] = [options["ci"]]
    return entry if len(entry) > 1 else entry["prompt"]
