"""YAML into dataclasses: what each annotation accepts, and what is said about everything else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import schema


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    name: str
    count: int = field(default=1, metadata={"min": 1, "max": 9})


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    whole: int = 0
    number: float = 0.0
    share: float = field(default=0.5, metadata={"above": 0.0, "below": 1.0})
    flag: bool = False
    text: str = ""
    maybe: str | None = None
    rate: float | None = None
    choice: Literal["auto", 16, 8] = "auto"
    pair: tuple[int, float] = (0, 0.0)
    sizes: tuple[int, ...] = field(default=(), metadata={"multiple_of": 16})
    words: list[str] = field(default_factory=list)
    ranks: Mapping[str, int] = field(default_factory=dict, metadata={"min": 1})
    table: dict[str, Inner] = field(default_factory=dict)
    inner: Inner | None = None
    section: Inner = field(default_factory=lambda: Inner(name="default"))
    many: tuple[Inner, ...] = ()
    mixed: tuple[str | Inner, ...] = ()
    either: Literal["all"] | tuple[str, ...] = "all"
    budget: Literal["auto"] | int = field(default="auto", metadata={"bytes": True, "above": 0})
    later: Literal["now", "soon", "then"] = field(default="now", metadata={"supported": ("now", "soon")})
    never: float | None = field(default=None, metadata={"supported": (None,)})
    off: bool = field(default=False, metadata={"supported": (False,)})
    checked: int = 0

    def __post_init__(self) -> None:
        if self.checked < 0:
            raise ValueError("'checked' goes with nothing")


def read(text: str) -> Outer:
    return schema.build(schema.compose(text, "c.yaml"), Outer)


def refusal(text: str) -> list[str]:
    with pytest.raises(InputError) as raised:
        read(text)
    return str(raised.value).splitlines()


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("whole: 3", "whole", 3),
        ("whole: -3", "whole", -3),
        ("whole: 1_000", "whole", 1000),
        ("number: 3", "number", 3.0),
        ("number: 1e-4", "number", 1e-4),  # YAML 1.1 takes this for a word
        ("number: 1.0e-4", "number", 1e-4),
        ("number: -2.", "number", -2.0),
        ("flag: true", "flag", True),
        ("flag: No", "flag", False),
        ("text: fox", "text", "fox"),
        ("text: '0123'", "text", "0123"),
        ("text: 0123", "text", "0123"),  # what stands there, not the octal 83
        ("text: 2024-01-31", "text", "2024-01-31"),
        ("maybe: null", "maybe", None),
        ("maybe: ~", "maybe", None),
        ("maybe:", "maybe", None),
        ("maybe: 'null'", "maybe", "null"),
        ("rate: 0.5", "rate", 0.5),
        ("rate: null", "rate", None),
        ("choice: 16", "choice", 16),
        ("choice: auto", "choice", "auto"),
        ("pair: [1, 2]", "pair", (1, 2.0)),
        ("sizes: [16, 32]", "sizes", (16, 32)),
        ("sizes: []", "sizes", ()),
        ("words: [a, b]", "words", ["a", "b"]),
        ("ranks: {a.*: 4}", "ranks", {"a.*": 4}),
        ("table: {x: {name: a}}", "table", {"x": Inner(name="a")}),
        ("inner: {name: a}", "inner", Inner(name="a")),
        ("inner: null", "inner", None),
        ("section: {name: a, count: 2}", "section", Inner(name="a", count=2)),
        ("many: {name: a}", "many", (Inner(name="a"),)),
        ("many: [{name: a}, {name: b}]", "many", (Inner(name="a"), Inner(name="b"))),
        ("mixed: [a, {name: b}]", "mixed", ("a", Inner(name="b"))),
        ("either: all", "either", "all"),
        ("either: [a]", "either", ("a",)),
        ("budget: auto", "budget", "auto"),
        ("budget: 24GB", "budget", 24 * 10**9),
        ("budget: 24 gb", "budget", 24 * 10**9),
        ("budget: 1.5GiB", "budget", 3 * 2**29),
        ("budget: 4096", "budget", 4096),
        ("later: soon", "later", "soon"),
        ("never: null", "never", None),
        ("off: no", "off", False),
    ],
)
def test_accepted(text: str, key: str, expected: object) -> None:
    value = getattr(read(text), key)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("whole: 1.5", "'whole' must be a whole number, found 1.5"),
        ("whole: 010", "'whole' must be a whole number, found 010"),
        ("whole: 12:30", "'whole' must be a whole number, found 12:30"),
        ("whole: 1__0", "'whole' must be a whole number, found 1__0"),
        ("whole: " + "9" * 5000, "'whole' must be a whole number, found " + "9" * 57 + "..."),
        ("whole: true", "'whole' must be a whole number, found true"),
        ("whole: null", "'whole' must be a whole number, found null"),
        ("whole: [1]", "'whole' must be a whole number, found a list"),
        ("whole: {a: 1}", "'whole' must be a whole number, found a mapping"),
        ("number: fast", "'number' must be a number, found 'fast'"),
        ("number: .inf", "'number' must be a number, found .inf"),
        ("number: nan", "'number' must be a number, found 'nan'"),
        ("share: 0", "'share' must be above 0.0, found 0"),
        ("share: 1", "'share' must be below 1.0, found 1"),
        ("flag: maybe", "'flag' must be true or false, found 'maybe'"),
        ("flag: 1", "'flag' must be true or false, found 1"),
        ("text: yes", "'text' must be text, found yes"),
        ("text: ~", "'text' must be text, found null"),
        ("maybe: [a]", "'maybe' must be text or null, found a list"),
        ("choice: atuo", "'choice' must be one of auto, 16, 8; found 'atuo'; did you mean 'auto'?"),
        ("choice: 4", "'choice' must be one of auto, 16, 8; found 4"),
        ("pair: [1]", "'pair' must be a list of 2, each a whole number, found 1 entries"),
        ("pair: 1", "'pair' must be a list of 2, each a whole number, found 1"),
        ("sizes: [16, 17]", "'sizes.1' must be a multiple of 16, found 17"),
        ("sizes: [16, x]", "'sizes.1' must be a whole number, found 'x'"),
        ("words: a", "'words' must be a list, each entry text, found 'a'"),
        ("ranks: {a: 0}", "'ranks.a' must be at least 1, found 0"),
        ("ranks: [1]", "'ranks' must be a mapping, each value a whole number, found a list"),
        ("section: {name: a, count: 10}", "'section.count' must be at most 9, found 10"),
        ("section: {count: 1}", "'section.name' is missing"),
        ("section: 3", "'section' must be a mapping, found 3"),
        ("many: [{name: a}, {}]", "'many.1.name' is missing"),
        ("many: {nmae: a, name: b}", "unknown key 'many.nmae'; did you mean 'many.name'?"),
        ("either: sum", "'either' must be all or a list, each entry text, found 'sum'"),
        ("budget: much", "'budget' must be auto or a size such as 24GB, found 'much'"),
        ("budget: 0", "'budget' must be above 0, found 0"),
        ("later: then", "'later' cannot be 'then' yet; so far there are 'now' and 'soon'"),
        ("never: 0.5", "'never' cannot be 0.5 yet; the only value so far is null"),
        ("off: on", "'off' cannot be on yet; the only value so far is false"),
        ("checked: -1", "'checked' goes with nothing"),
        ("whoel: 3", "unknown key 'whoel'; did you mean 'whole'?"),
        ("count: 3", "unknown key 'count'; did you mean 'section.count'?"),
        ("section: {name: a, xyz: 1}", "unknown key 'section.xyz'; known here: name, count"),
        ("whole: 1\nwhole: 2", "duplicate key 'whole'; it stands at c.yaml:1 already"),
        ("ranks:\n  a: 1\n  a: 2", "duplicate key 'a'; it stands at c.yaml:2 already"),
        ("[1]: 2", "a key must be text, found a list"),
        ("- 1", "the file must be a mapping, found a list"),
        ("whole: !!python/object:os.system 1", "'whole' must be a whole number, found 1"),
    ],
)
def test_refused(text: str, sentence: str) -> None:
    line = text.count("\n") + 1
    assert refusal(text) == [f"c.yaml:{line}: {sentence}"]


def test_all_faults_at_once_with_their_lines() -> None:
    assert refusal("whole: x\n\nsection:\n  name: a\n  count: 0\nflga: true\nmany:\n- name: 1\n- {}\n") == [
        "c.yaml:1: 'whole' must be a whole number, found 'x'",
        "c.yaml:5: 'section.count' must be at least 1, found 0",
        "c.yaml:6: unknown key 'flga'; did you mean 'flag'?",
        "c.yaml:9: 'many.1.name' is missing",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", 1),
        ("a: b: c", 1),
        ("a: 1\n\tb: 2", 2),
        ("a: 1\n---\nb: 2", 2),
        ("a: *x", 1),
        ("a: \0", None),
    ],
)
def test_what_is_not_yaml(text: str, line: int | None) -> None:
    (message,) = refusal(text)
    assert message.startswith(f"c.yaml:{line}: this is not YAML" if line else "c.yaml: this is not YAML")


def test_deep_nesting_is_refused_in_a_sentence() -> None:
    assert "this is not YAML" in refusal("whole: " + "[" * 5000)[0]


def test_an_empty_document_is_all_defaults() -> None:
    assert read("") == Outer()


def set_(text: str, *assignments: str) -> Outer:
    root = schema.compose(text, "c.yaml") or schema.empty("c.yaml")
    for assignment in assignments:
        root = schema.override(root, assignment)
    return schema.build(root, Outer)


def test_an_override_replaces_adds_and_goes_into_lists() -> None:
    made = set_(
        "whole: 1\nmany:\n- name: a\n- name: b\nsection:\n",
        "whole=2",
        "whole=3",
        "section.name=c",
        "many.1.count=7",
        "inner.name=new",
        "maybe=",
        "ranks={a.b: 2}",
        "number = 1e-4",
    )
    assert made == Outer(
        whole=3,
        section=Inner(name="c"),
        many=(Inner(name="a"), Inner(name="b", count=7)),
        inner=Inner(name="new"),
        ranks={"a.b": 2},
        number=1e-4,
    )


def test_an_override_leaves_what_an_anchor_shares() -> None:
    made = set_("many: [&a {name: a}, *a]", "many.0.name=b")
    assert made.many == (Inner(name="b"), Inner(name="a"))


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("whoel=1", "unknown key 'whoel'; did you mean 'whole'?"),
        ("whole=x", "'whole' must be a whole number, found 'x'"),
        ("whole", "write it as key.path=value, for example --set lora.rank=8"),
        ("a..b=1", "write it as key.path=value, for example --set lora.rank=8"),
        ("whole.deep=1", "'whole' is a single value, so there is no 'whole.deep'"),
        ("many.2.name=x", "'many' is a list of 2; say 'many.0' and so on"),
        ("many.name=x", "'many' is a list of 2; say 'many.0' and so on"),
    ],
)
def test_a_wrong_override_is_named(assignment: str, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        set_("whole: 1\nmany: [{name: a}, {name: b}]", assignment)
    assert str(raised.value) == f"--set {assignment}: {sentence}"


def test_an_override_that_is_not_yaml_is_named() -> None:
    with pytest.raises(InputError, match=r"--set words=\[a: this is not YAML"):
        set_("", "words=[a")
