"""`relay import`, the engine: tables of their keys and ours, applied to what a foreign config says.

A tool is a table of `Rule`s and nothing else but how its files are read. What no rule names is told as unknown, and a
value that our schema refuses is told, too, so that the config which comes out always loads.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.commented import Line, checked, document
from flux2_relay.pipeline.config import Config

Tree = Mapping[str, object]


class NotCarried(Exception):
    """Raised by a conversion: this value has no counterpart here, for the reason given."""


_SECRET = re.compile(r"(token|api_key|secret|password)$")  # the new config may be shown to others

_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*|^%\w+%")

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
    """Our dotted key with the same `*`; None carries nothing over, and `remark` says why; "" where `convert` does."""
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
        self.left.append(Left(key, "(not repeated)" if _SECRET.search(key) else _short(value), why))

    def lines(self) -> list[Line]:
        """Our config, in the order of its sections."""
        return _ordered(self.values)


# Words that tables are written in


def under(branch: str, *rules: Rule) -> tuple[Rule, ...]:
    """Rules for the keys of a branch, written without its name."""
    return tuple(replace(rule, theirs=f"{branch}.{rule.theirs}") for rule in rules)


def left_out(why: str, *keys: str) -> tuple[Rule, ...]:
    """Keys without a counterpart, whatever they say."""
    return tuple(Rule(key, None, remark=why) for key in keys)


def passed_over(*keys: str) -> tuple[Rule, ...]:
    """Keys that mean nothing here, or that are read elsewhere: nobody misses them."""
    return left_out("", *keys)


def only(expected: object, why: str, *keys: str) -> tuple[Rule, ...]:
    """Keys of which one value is what happens here; the others are told."""
    return tuple(Rule(key, "", _unless(lambda value: value == expected, why)) for key in keys)


def unless_off(why: str, *keys: str) -> tuple[Rule, ...]:
    """Keys without a counterpart that need no mention where they are off or empty."""
    return tuple(Rule(key, "", _unless(lambda value: not value, why)) for key in keys)


def _unless(is_met: Callable[[object], bool], why: str) -> Convert:
    def convert(value: object, _: Tree) -> object:
        raise NotCarried("" if is_met(value) else why)

    return convert


# The engine


def apply(rules: Sequence[Rule], tree: Tree, carried: Carried) -> None:
    """Take a whole foreign config through a table."""
    exact = {rule.theirs: rule for rule in rules}
    for path, value, inside in _walk(tree, "", exact):
        rule = _rule(path, exact)
        if rule is None:
            if value not in (None, {}, []):  # nothing was said
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
        if isinstance(value, str) and _VARIABLE.search(value):
            raise NotCarried("a variable of the shell, whose value is not here: write it yourself")
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
