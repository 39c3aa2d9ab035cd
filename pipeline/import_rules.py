"""`relay import`, the engine: tables of their keys and ours, applied to what a foreign config says.

A tool is a table of `Rule`s and nothing else but how its files are read. What no rule names is told as unknown, and a
value that our schema refuses is told, too, so that the config which comes out always loads.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.commented import Line, checked, document
from flux2_relay.pipeline.config import Config

Tree = Mapping[str, object]


class NotCarried(Exception):
    """Raised by a conversion: this value has no counterpart here, for the reason given."""


Convert = Callable[[object, Tree], object]
"""Their value and the mapping it stands in -> our value."""


def same(value: object, _: Tree) -> object:
    """The value as it is."""
    return value


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of one of their keys."""

    theirs: str
    """A dotted key; `*` stands for the number in a list and, at the end of a key without ours, for any rest."""
    ours: str | None
    """Our dotted key with the same `*`; None carries nothing over, and `remark` says why; "" is for `unless`."""
    convert: Convert = same
    remark: str = ""
    """Said beside the value, or why there is none; an empty remark of a key without ours passes in silence."""


@dataclass(frozen=True, slots=True)
class Left:
    """One of their keys that was not carried over."""

    key: str
    value: str
    why: str


@dataclass(slots=True)
class Carried:
    """What has been carried over so far."""

    tool: str
    values: dict[str, tuple[object, str]] = field(default_factory=dict)
    """Our key -> value, and what is said beside it."""
    left: list[Left] = field(default_factory=list)

    def put(self, ours: str, value: object, why: str, theirs: str = "") -> None:
        """Set one of our keys, a later one replacing an earlier one; what the schema refuses is left out."""
        try:
            checked(document((), _ordered({ours: (value, ""), **_least(ours)})), "")
        except InputError as error:
            self.leave(theirs or ours, value, re.sub(r"^:\d+: ", "", str(error)))
            return
        self.values[ours] = value, why

    def leave(self, key: str, value: object, why: str) -> None:
        """Note what has no counterpart here."""
        self.left.append(Left(key, _short(value), why))

    def lines(self) -> list[Line]:
        """Our config, in the order of its sections."""
        return _ordered(self.values)


def apply(rules: Sequence[Rule], tree: Tree, carried: Carried) -> None:
    """Take a whole foreign config through a table."""
    exact = {rule.theirs: rule for rule in rules}
    for path, value, inside in _walk(tree, "", exact):
        rule = _rule(path, exact)
        if rule is None:
            carried.leave(path, value, "this key is not known to the importer")
        elif rule.ours is None:
            if rule.remark:
                carried.leave(path, value, rule.remark)
        else:
            _carry(rule, path, (value, inside), carried)


def _carry(rule: Rule, path: str, found: tuple[object, Tree], carried: Carried) -> None:
    value, inside = found
    number = next(iter(re.findall(r"\.(\d+)(?:\.|$)", path)), "0")
    try:
        ours = (rule.ours or "").replace("*", number)
        said = f"{carried.tool}: {path.rpartition('.')[2]}" + (f"; {rule.remark}" if rule.remark else "")
        carried.put(ours, rule.convert(value, inside), said, path)
    except NotCarried as reason:
        if str(reason):
            carried.leave(path, value, str(reason))


def _walk(tree: object, path: str, exact: Mapping[str, Rule]) -> Iterator[tuple[str, object, Tree]]:
    """Every leaf with its path and the mapping it stands in; a rule for a whole branch makes it a leaf."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            below = f"{path}.{name}" if path else str(name)
            if _rule(below, exact) is None and _is_branch(value):
                yield from _walk(value, below, exact)
            else:
                yield below, value, tree
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _walk(value, f"{path}.{number}", exact)


def _is_branch(value: object) -> bool:
    is_list = isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
    return is_list or (isinstance(value, Mapping) and bool(value))


def _rule(path: str, exact: Mapping[str, Rule]) -> Rule | None:
    general = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    if general in exact:
        return exact[general]
    groups = (rule for name, rule in exact.items() if rule.ours is None and name.endswith(".*"))
    return next((rule for rule in groups if fnmatchcase(general, rule.theirs)), None)


_SECTIONS = tuple(field.name for field in fields(Config))


def _ordered(values: Mapping[str, tuple[object, str]]) -> list[Line]:
    def place(key: str) -> tuple[int, int, bool]:
        parts = key.split(".")
        number = int(parts[1]) if len(parts) == 3 else 0
        return _SECTIONS.index(parts[0]), number, parts[-1] != "path"

    return [Line(key, *values[key]) for key in sorted(values, key=place)]


def _least(ours: str) -> dict[str, tuple[object, str]]:
    """What a config must have for one key of it to be checked."""
    needed: dict[str, tuple[object, str]] = {"model.path": ("m", "")}
    if ours.startswith("data."):
        needed[f"data.{ours.split('.')[1]}.path"] = "d", ""
    return {key: value for key, value in needed.items() if key != ours}


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:39] + "…"


# Conversions that several tools share


def choice(table: Mapping[object, object], otherwise: str = "there is nothing like it here") -> Convert:
    """One of a few words (any case) for another."""

    def convert(value: object, _: Tree) -> object:
        key = value.lower() if isinstance(value, str) else value
        if not isinstance(key, Hashable) or key not in table:
            raise NotCarried(otherwise)
        return table[key]

    return convert


def area(value: object, _: Tree) -> list[int]:
    """A resolution, [W, H] or a list of resolutions -> area budgets R in steps of 16."""
    sides = [side for side in (value if isinstance(value, list) else [value]) if isinstance(side, int | float)]
    if not sides or not all(16 <= side <= 1 << 16 for side in sides):
        raise NotCarried("this is no size in pixels")
    return list(dict.fromkeys(round(side / 16) * 16 for side in sides))


def rectangle(value: object, here: Tree) -> list[int]:
    """[W, H] of one bucket -> the side of a square with its area."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int | float) for side in value):
        return area((value[0] * value[1]) ** 0.5, here)
    return area(value, here)


def size(width: str, height: str, default: int = 512) -> Convert:
    """Width and height that stand side by side, as one size in steps of 16."""

    def convert(_: object, here: Tree) -> list[int]:
        sides = [here.get(width, default), here.get(height, default)]
        if not all(isinstance(side, int) and side >= 16 for side in sides):
            raise NotCarried("this is no size in pixels")
        return [round(int(str(side)) / 16) * 16 for side in sides]

    return convert


def unless(expected: object, why: str) -> Convert:
    """For keys whose only value that means something here is `expected`: nothing to carry, or a reason."""

    def convert(value: object, _: Tree) -> object:
        raise NotCarried("" if value == expected else why)

    return convert


DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "float32": "float32", "float": "float32"}
OPTIMIZERS: Mapping[object, object] = {
    **dict.fromkeys(("adamw", "adamw8bit", "adam8bit", "adam", "pagedadamw8bit", "pagedadamw"), "adamw"),
    **dict.fromkeys(("lion", "lion8bit"), "lion"),
    **dict.fromkeys(("adafactor",), "adafactor"),
    **dict.fromkeys(("prodigy", "prodigy8bit"), "prodigy"),
}
SCHEDULES: Mapping[object, object] = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "linear": "linear",
}


def pictures_in(folder: object) -> int:
    """How many pictures a data folder holds here; 0 where it is not here."""
    from flux2_relay.stages.encode.companions import is_image, walk

    place = Path(str(folder)).expanduser()
    try:
        return sum(map(is_image, walk(place))) if place.is_dir() else 0
    except OSError:
        return 0


def put_epochs(carried: Carried, key: str, epochs: object) -> None:
    """A length in epochs as one in steps, where the pictures can be counted."""
    values = {name: value for name, (value, _) in carried.values.items()}
    numbers = {name.split(".")[1] for name in values if name.startswith("data.")}
    counts = [pictures_in(values.get(f"data.{n}.path")) * int(str(values.get(f"data.{n}.repeats", 1))) for n in numbers]
    passes = int(str(values.get("train.batch", 1))) * int(str(values.get("train.accumulate", 1)))
    if not counts or not all(counts) or not isinstance(epochs, int):
        carried.leave(key, epochs, "set train.steps: epochs x pictures / batch, no pictures are there to be counted")
        return
    steps = max(1, epochs * sum(counts) // passes)
    carried.put("train.steps", steps, f"{carried.tool}: {key} {epochs} x {sum(counts)} pictures / {passes}")
