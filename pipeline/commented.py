"""A config as people like to get one: YAML with a comment beside every value that says why it is what it is.

`relay init` and `relay import` write with it; what is written is read back by the schema before anybody sees it.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path

import yaml

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import schema
from flux2_relay.pipeline.config import Config

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Line:
    """One key with its value and the reason for it."""

    key: str
    """`section.key`; of the list of data folders `data.0.path` and so on, `path` first."""
    value: object
    why: str = ""
    is_set: bool = True
    """False writes the line as a comment: a choice that is near at hand."""


def document(head: Sequence[str], lines: Sequence[Line]) -> str:
    """The text of a config file: `head` as a comment, then a section after the other in the order of `lines`."""
    blocks = ["".join(f"# {line}".rstrip() + "\n" for line in head)]
    for section, members in groupby(lines, key=lambda line: line.key.partition(".")[0]):
        blocks.append(f"{section}:\n" + "".join(f"{text}\n" for text in _section(list(members))))
    return "\n".join(blocks)


def checked(text: str, origin: str) -> Config:
    """The config that a text is; InputError where it is none."""
    return schema.build(schema.compose(text, origin), Config)


def save(path: Path, text: str, force: bool) -> Config:
    """Write a config to a file that is not there yet (`force`: or is) after checking it -> what it loads to."""
    config = checked(text, str(path))
    try:
        with open(path.expanduser(), "w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{path} exists; name another file with -o, or replace this one with --force") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another file with -o") from error
    return config


def _section(lines: Sequence[Line]) -> Iterator[str]:
    begun = ""
    for line in lines:
        parts = line.key.split(".")
        name, indent = parts[-1], "  "
        if len(parts) == 3:  # an entry of the list of data folders
            indent = "    " if begun == parts[1] else "  - "
            begun = parts[1]
        yield from _written(indent, name, line)


def _written(indent: str, name: str, line: Line) -> Iterator[str]:
    mark = "" if line.is_set else "# "
    start = f"{indent}{mark}{name}:"
    if _is_block(line.value):
        yield from _above(indent, line.why)
        yield start
        for entry in line.value:  # pyright: ignore[reportGeneralTypeIssues] - a list, says _is_block
            yield from _entry(f"{indent.replace('-', ' ')}{mark}  ", entry)
        return
    whole = f"{start} {scalar(line.value)}"
    if not line.why:
        yield whole
    elif len(whole) + len(line.why) + 4 <= _WIDTH:
        yield f"{whole}  # {line.why}"
    elif indent.endswith("- "):  # nothing may stand between the dash and its first key
        yield whole
        yield from _above("    ", line.why)
    else:
        yield from _above(indent, line.why)
        yield whole


def _above(indent: str, why: str) -> Iterator[str]:
    lead = indent.replace("-", " ") + "# "
    yield from (lead + part for part in textwrap.wrap(why, _WIDTH - len(lead), break_on_hyphens=False))


def _is_block(value: object) -> bool:
    """Whether a value is a list whose entries deserve a line each."""
    return isinstance(value, list | tuple) and any(
        isinstance(entry, Mapping) or (isinstance(entry, str) and len(entry) > 20) for entry in value
    )


def _entry(indent: str, entry: object) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield f"{indent}- {scalar(entry)}"
        return
    for number, (name, value) in enumerate(entry.items()):
        yield f"{indent}{'  ' if number else '- '}{name}: {scalar(value)}"


def scalar(value: object) -> str:
    """A value on one line of YAML; what the schema reads from it is equal."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{scalar(name)}: {scalar(entry)}' for name, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(scalar, value))}]"
    flow = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)
    text = flow.strip()[1:-1]
    if len(text.splitlines()) != 1:  # a line break of whatever kind
        text = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf).strip()
    return text


def _number(value: float) -> str:
    """0.05, 1.0e-4: small numbers as learning rates are written."""
    if value == 0 or not math.isfinite(value) or 0.01 <= abs(value) < 1e6:
        return repr(value)
    exponent = math.floor(math.log10(abs(value)))
    mantissa = f"{Decimal(repr(value)).scaleb(-exponent):f}"
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}"
