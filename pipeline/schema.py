"""YAML into frozen dataclasses, with a line number for every fault; no key is known here by name.

A field's annotation says what is accepted: int, float, bool, str, None, Literal, unions of them, lists as
`tuple[X, ...]`, `tuple[X, Y]` or `list[X]`, `Mapping[str, X]` or `dict[str, X]`, and dataclasses.
Its metadata say more: `min`, `max`, `above`, `below`, `multiple_of` (in lists and mappings: for each entry),
`bytes` (sizes such as 24GB) and `supported` (the values that work so far, where a type promises more).
A list of dataclasses may be written as one mapping. `__post_init__` refuses with ValueError or InputError.
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from flux2_relay.cache.errors import InputError

T = TypeVar("T")

INTEGER = re.compile(r"[-+]?(0|[1-9](_?[0-9]){0,17})")  # no leading zero: YAML takes 010 for 8
SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]i?)?B?", re.IGNORECASE)
UNITS = {"": 1} | {p: 1000**n for n, p in enumerate("kmgt", 1)}
UNITS |= {p + "i": 1024**n for n, p in enumerate("kmgt", 1)}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULL_TAG, BOOL_TAG = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
TEXT_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "timestamp", "value")}
SIMPLE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
LIMITS = {"min": "at least", "max": "at most", "above": "above", "below": "below", "multiple_of": "a multiple of"}
REFUSED = object()  # a value that was not accepted; its fault is noted
Rules = Mapping[str, Any]
Annotation: TypeAlias = Any  # int, `str | None`, a dataclass ...: typing has no one type for them


def compose(text: str, origin: str) -> Node | None:
    """The node tree of one YAML document, None if empty; marks carry `origin`, a file name or `--set ...`."""
    try:
        loader = yaml.SafeLoader(text)
        loader.name = origin  # what the marks of the nodes show
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and not origin.startswith("--set") else ""
        raise InputError(f"{origin}{line}: this is not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{origin}: this is not YAML: {str(error).splitlines()[0]}") from error


def override(root: Node, assignment: str) -> Node:
    """A tree in which the `key.path=value` of one `--set` replaces what the file said; `root` stays."""
    origin = f"--set {assignment}"
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"{origin}: write it as key.path=value, for example --set lora.rank=8")
    return _replaced(root, keys, compose(text, origin) or empty(origin), "")


def empty(origin: str) -> Node:
    """The null that stands for an empty file, or for `--set key=`."""
    mark = yaml.Mark(origin, 0, 0, 0, None, 0)
    return ScalarNode(NULL_TAG, "", mark, mark)


def build(node: Node | None, kind: type[T], path: str = "") -> T:
    """A `kind` (a dataclass) from a mapping; `path` is the dotted name of `node` in messages.

    Every fault of the tree is in the one InputError that is raised, a line each.
    """
    builder = _Builder(kind, path)
    value = builder.record(node, kind, path)
    if builder.faults:
        raise InputError("\n".join(builder.faults))
    return cast(T, value)


def plain(value: object) -> object:
    """The mappings, lists and scalars that YAML writes and `build` reads back as an equal value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def accepted(kind: Annotation, rules: Rules) -> str:
    """What a field takes, in words, its limits included."""
    limits = [f"{say} {rules[rule]}" for rule, say in LIMITS.items() if rule in rules]
    return ", ".join([_say(kind, rules), *limits])


class _Builder:
    """Walks a node tree beside the type it should have, and notes every fault on the way."""

    def __init__(self, root: type, path: str) -> None:
        self.faults: list[str] = []
        self.known = list(_known_keys(root, path))

    def fault(self, node: Node | None, sentence: str) -> object:
        self.faults.append(f"{_where(node)}: {sentence}" if node else sentence)
        return REFUSED

    def record(self, node: Node | None, kind: type, path: str) -> object:
        """A dataclass from a mapping; an empty section is one of nothing but defaults."""
        if node is not None and not isinstance(node, MappingNode) and node.tag != NULL_TAG:
            named = f"'{path}'" if path else "the file"
            return self.fault(node, f"{named} must be a mapping, found {_found(node)}")
        before = len(self.faults)
        hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
        values: dict[str, object] = {}
        for name, key, value in self.pairs(node):
            if name not in fields:
                self.unknown(key, _join(path, name), list(fields))
                continue
            values[name] = self.field(value, hints[name], _join(path, name), fields[name].metadata)
        for name, declared in fields.items():
            if name not in values and _is_required(declared):
                self.missing(node, hints[name], _join(path, name))
        if len(self.faults) > before:
            return REFUSED
        try:
            return kind(**values)
        except (ValueError, InputError) as error:
            return self.fault(node, f"{path}: {error}" if path else str(error))

    def missing(self, node: Node | None, kind: Annotation, path: str) -> None:
        if dataclasses.is_dataclass(kind):
            for key in _known_keys(cast(type, kind), path, required=True):
                self.fault(node, f"'{key}' is missing")
        else:
            self.fault(node, f"'{path}' is missing")

    def pairs(self, node: Node | None) -> Iterator[tuple[str, Node, Node]]:
        """Name, key and value of each entry; YAML itself would let a later duplicate win in silence."""
        first: dict[str, Node] = {}
        for key, value in node.value if isinstance(node, MappingNode) else ():
            if not isinstance(key, ScalarNode):
                self.fault(key, f"a key must be text, found {_found(key)}")
            elif key.value in first:
                before = _where(first[key.value])
                self.fault(key, f"duplicate key '{key.value}'; it stands at {before} already")
            else:
                first[key.value] = key
                yield key.value, key, value

    def unknown(self, key: Node, path: str, siblings: Sequence[str]) -> None:
        section, leaf = path[: -len(_leaf(path))], _leaf(path)
        near = [known for known in self.known if _leaf(known) == leaf]  # the right key in the wrong section
        near = near or [section + name for name in difflib.get_close_matches(leaf, siblings, n=1)]
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(siblings)}"
        self.fault(key, f"unknown key '{path}'; {hint}")

    def field(self, node: Node, kind: Annotation, path: str, rules: Rules) -> object:
        value = self.value(node, kind, path, rules)
        if value is REFUSED or "supported" not in rules or value in rules["supported"]:
            return value
        works = " and ".join(repr(v) if isinstance(v, str) else str(plain(v)) for v in rules["supported"])
        only = "the only value so far is" if len(rules["supported"]) == 1 else "so far there are"
        works = re.sub(r"\bNone\b", "null", works.replace("False", "false"))
        return self.fault(node, f"'{path}' cannot be {_found(node)} yet; {only} {works}")

    def value(self, node: Node, kind: Annotation, path: str, rules: Rules) -> object:
        """Whatever the annotation `kind` says, or REFUSED with the fault noted."""
        for option in _alternatives(kind):
            if dataclasses.is_dataclass(option) and (isinstance(node, MappingNode) or node.tag == NULL_TAG):
                return self.record(node, cast(type, option), path)
            if isinstance(node, MappingNode | SequenceNode) and get_origin(option) not in (None, Literal):
                made = self.container(node, option, path, rules)
                if made is not None:
                    return made
            if isinstance(node, ScalarNode):
                value = _scalar(node, option, rules)
                broken = _broken_rule(value, rules)
                if broken:
                    return self.fault(node, f"'{path}' must be {broken}, found {_found(node)}")
                if value is not REFUSED:
                    return value
        stop = ";" if get_origin(kind) is Literal else ","
        sentence = f"'{path}' must be {_say(kind, rules)}{stop} found {_found(node)}"
        return self.fault(node, sentence + _near_choice(node, kind))

    def container(self, node: Node, kind: Annotation, path: str, rules: Rules) -> object | None:
        """A list or a mapping; None where `node` has the other shape."""
        origin, arguments = get_origin(kind), get_args(kind)
        if isinstance(node, MappingNode) and issubclass(origin, Mapping):
            made = {n: self.value(v, arguments[1], _join(path, n), rules) for n, _, v in self.pairs(node)}
            return REFUSED if any(v is REFUSED for v in made.values()) else made
        is_records = origin in (tuple, list) and dataclasses.is_dataclass(arguments[0])
        if isinstance(node, MappingNode) and is_records:
            one = self.record(node, cast(type, arguments[0]), path)
            return REFUSED if one is REFUSED else origin([one])
        if isinstance(node, SequenceNode) and origin in (tuple, list):
            is_fixed = origin is tuple and arguments[-1] is not Ellipsis
            kinds = arguments if is_fixed else arguments[:1] * len(node.value)
            if len(kinds) != len(node.value):
                counted = f"found {len(node.value)} entries"
                return self.fault(node, f"'{path}' must be {_say(kind, rules)}, {counted}")
            entries = [
                self.value(entry, entry_kind, _join(path, str(i)), rules)
                for i, (entry, entry_kind) in enumerate(zip(node.value, kinds, strict=True))
            ]
            return REFUSED if any(e is REFUSED for e in entries) else origin(entries)
        return None


def _replaced(node: Node, keys: Sequence[str], value: Node, path: str) -> Node:
    # Copies the nodes on the way: an anchor may share them with other places, which --set did not name.
    if not keys:
        return value
    key, here = keys[0], _join(path, keys[0])
    if isinstance(node, SequenceNode):
        entries = list(node.value)
        if not key.isdecimal() or int(key) >= len(entries):
            raise InputError(f"{_where(value)}: '{path}' is a list of {len(entries)}; say '{path}.0' and so on")
        entries[int(key)] = _replaced(entries[int(key)], keys[1:], value, here)
        return SequenceNode(node.tag, entries, node.start_mark, node.end_mark)
    if not isinstance(node, MappingNode) and node.tag != NULL_TAG:
        raise InputError(f"{_where(value)}: '{path}' is a single value, so there is no '{here}'")
    pairs = list(node.value) if isinstance(node, MappingNode) else []
    nothing = MappingNode("tag:yaml.org,2002:map", [], value.start_mark, value.end_mark)
    at = next((i for i, (k, _) in enumerate(pairs) if k.value == key), len(pairs))
    key_node, old = pairs[at] if at < len(pairs) else (None, nothing)
    # The key takes the mark of the override: if it is unknown, that is where the user wrote it.
    key_node = key_node or ScalarNode("tag:yaml.org,2002:str", key, value.start_mark, value.end_mark)
    pairs[at : at + 1] = [(key_node, _replaced(old, keys[1:], value, here))]
    return MappingNode("tag:yaml.org,2002:map", pairs, node.start_mark, node.end_mark)


def _scalar(node: ScalarNode, kind: Annotation, rules: Rules) -> object:
    """The value of one scalar as one simple type, or REFUSED; says nothing."""
    text = node.value
    if node.tag == NULL_TAG:
        return None if kind is type(None) else REFUSED
    if node.tag not in TEXT_TAGS and node.tag != BOOL_TAG:
        return REFUSED  # something like !!binary
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), REFUSED)
    if kind is bool:
        return BOOLEANS.get(text.lower(), REFUSED)
    if kind is int:
        return _size(text) if rules.get("bytes") else int(text) if INTEGER.fullmatch(text) else REFUSED
    if kind is float:
        return _finite(text)  # by the text, not by YAML's tag: YAML takes `1e-4` for a word
    return text if kind is str and node.tag in TEXT_TAGS else REFUSED


def _finite(text: str) -> object:
    try:
        number = float(text)
    except ValueError:
        return REFUSED
    return number if math.isfinite(number) else REFUSED


def _size(text: str) -> object:
    """Bytes: `24GB` is 24e9, `24GiB` 24 * 2**30, `24` 24."""
    match = SIZE.fullmatch(text)
    return round(float(match[1]) * UNITS[(match[2] or "").lower()]) if match else REFUSED


def _broken_rule(value: object, rules: Rules) -> str | None:
    """What a number should have been, None if it is that."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    checks = {
        "min": (f"at least {rules.get('min')}", lambda limit: value >= limit),
        "max": (f"at most {rules.get('max')}", lambda limit: value <= limit),
        "above": (f"above {rules.get('above')}", lambda limit: value > limit),
        "below": (f"below {rules.get('below')}", lambda limit: value < limit),
        "multiple_of": (f"a multiple of {rules.get('multiple_of')}", lambda limit: value % limit == 0),
    }
    broken = (say for rule, (say, holds) in checks.items() if rule in rules and not holds(rules[rule]))
    return next(broken, None)


def _alternatives(kind: Annotation) -> list[Any]:
    """The members of a union, null first and text last: every scalar could be text."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return sorted(members, key=lambda member: (member is not type(None), member is str))


def _say(kind: Annotation, rules: Rules) -> str:
    """The annotation in words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_say(member, rules) for member in get_args(kind))
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(kind) in (tuple, list):
        entry = _say(get_args(kind)[0], {})
        is_fixed = get_origin(kind) is tuple and get_args(kind)[-1] is not Ellipsis
        return f"a list of {len(get_args(kind))}, each {entry}" if is_fixed else f"a list, each entry {entry}"
    if get_origin(kind) is not None:
        return f"a mapping, each value {_say(get_args(kind)[1], {})}"
    if kind is int and rules.get("bytes"):
        return "a size such as 24GB"
    return SIMPLE.get(kind, "a mapping")


def _found(node: Node) -> str:
    if isinstance(node, ScalarNode):
        if node.tag == NULL_TAG:
            return "null"
        text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
        return repr(text) if node.tag == "tag:yaml.org,2002:str" else text
    return "a mapping" if isinstance(node, MappingNode) else "a list"


def _near_choice(node: Node, kind: Annotation) -> str:
    choices = [str(c) for k in _alternatives(kind) if get_origin(k) is Literal for c in get_args(k)]
    near = difflib.get_close_matches(node.value, choices, n=1) if isinstance(node, ScalarNode) else []
    return f"; did you mean '{near[0]}'?" if near else ""


def _known_keys(kind: type, path: str, required: bool = False) -> Iterator[str]:
    """Dotted names of every key below a dataclass, or of those that have no default."""
    hints = get_type_hints(kind)
    for declared in dataclasses.fields(kind):
        if required and not _is_required(declared):
            continue
        name, below = _join(path, declared.name), hints[declared.name]
        if get_origin(below) in (tuple, list) and not required:
            below = get_args(below)[0]
        if dataclasses.is_dataclass(below):
            yield from _known_keys(cast(type, below), name, required)
        else:
            yield name


def _is_required(declared: "dataclasses.Field[Any]") -> bool:
    return declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING


def _where(node: Node) -> str:
    mark = node.start_mark
    return mark.name if mark.name.startswith("--set") else f"{mark.name}:{mark.line + 1}"


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
