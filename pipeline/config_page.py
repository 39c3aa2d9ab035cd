"""docs/config.md: every key of a config, from the records that declare them.

    python -m flux2_relay.pipeline.config_page > docs/config.md

A test compares the page with this; the sentence of a key is the one under its field.
"""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from flux2_relay.pipeline import schema
from flux2_relay.pipeline.config import Config

_HEAD = """# Every key of a config

Written from the code by `python -m flux2_relay.pipeline.config_page`; do not edit it by hand. A key that is left out
has its default. [configs](../configs/README.md) has files to start from, `relay init` writes one for a data set, and
`relay import` turns one of another trainer into one of these.

Any key can be set for one command: `--set lora.rank=8`. Unknown keys, wrong types and values out of range are refused
with line and nearest name, all at once. Paths are relative to the working folder, and `~` is expanded.
"""


def page() -> str:
    """The whole page."""
    hints = get_type_hints(Config)
    sections = [_section(field.name, hints[field.name]) for field in dataclasses.fields(Config)]
    return "\n".join([_HEAD, *sections])


def _section(name: str, kind: Any) -> str:  # noqa: ANN401 - an annotation
    if name == "sweep":
        lines = (line.strip() for line in sentences(Config)[name].splitlines())
        return "## sweep\n\n" + "".join(f"{line}\n" for line in lines)
    is_list = get_origin(kind) is tuple
    record = cast(type, get_args(kind)[0] if is_list else kind)
    lead = [f"## {name}", "", (record.__doc__ or "").splitlines()[0], ""]
    if is_list:
        lead += ["One mapping, or a list of them.", ""]
    rows = ["| key | takes | default | |", "|---|---|---|---|", *_rows(record, name)]
    inner = [_section(f"{name}.{key}", below) for key, below in _records_in_lists(record)]
    return "\n".join([*lead, *rows, "", *inner])


def _records_in_lists(record: type) -> Iterator[tuple[str, type]]:
    """Keys whose list entries may be mappings of their own."""
    for key, kind in get_type_hints(record).items():
        entries = get_args(kind)[0] if get_origin(kind) is tuple else None
        for member in get_args(entries) if entries is not None else ():
            if dataclasses.is_dataclass(member):
                yield key, cast(type, member)


def _rows(record: type, section: str) -> Iterator[str]:
    hints, said = get_type_hints(record), sentences(record)
    for field in dataclasses.fields(record):
        takes = schema.accepted(hints[field.name], field.metadata)
        if "supported" in field.metadata:
            takes += f" (so far {', '.join(map(str, field.metadata['supported']))})"
        cells = f"`{section}.{field.name}`", takes, _default(field), " ".join(said[field.name].split())
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "must be given"
    plain = schema.plain(value)
    text = "null" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)
    return f"`{text}`"


def sentences(record: type) -> dict[str, str]:
    """Field -> the text under it in the source of its record."""
    source = Path(str(sys.modules[record.__module__].__file__)).read_text(encoding="utf-8")
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == record.__name__)
    said = {}
    for field, below in zip(found.body, found.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            said[field.target.id] = str(ast.literal_eval(below.value))
    return said


if __name__ == "__main__":
    sys.stdout.write(page())
