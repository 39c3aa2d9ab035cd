"""Keys are a format: the values here were made with `printf ... | sha256sum` and must never move."""

import hashlib
import json
from collections import OrderedDict
from enum import IntEnum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import KEY, canonical, key_of

TEXT = {
    "kind": "text",
    "format": 1,
    "encoder": "e",
    "tokenizer": "k",
    "template": "t",
    "taps": [10, 20, 30],
    "max_length": 512,
    "rows": "own",
    "quant": {"mode": "affine", "group": 64, "bits": 8},
    "compute": "bfloat16",
    "dtype": "bfloat16",
    "numerics": 1,
    "caption": "a red fox",
}
LATENTS = {
    "kind": "latents",
    "format": 1,
    "vae": "v",
    "source": "s",
    "decode": 1,
    "background": None,
    "resize": [512, 544, "lanczos"],
    "crop": [0, 16, 512, 512],
    "flip": False,
    "compute": "float32",
    "tf32": False,
    "dtype": "float16",
    "numerics": 1,
}


@pytest.mark.parametrize(
    ("key_object", "key"),
    [
        ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
        (
            {"b": {"y": "", "x": -3}, "a": [1, None, True, "é"]},
            "27d94b2257de7fcfa64fbeb316204dd33cbf17b734fa9c5cd9c0f7e3a98e7cbe",
        ),
        (TEXT, "9272406b374ef2baf57d8092d5df863ed10a83806660d4ec8524fad17bd1e958"),
        (LATENTS, "5f4c118631cdafb330060ced8326984507199bf732cbc5e651c419df5dc67519"),
    ],
)
def test_golden_keys(key_object, key):
    assert key_of(key_object) == key


@pytest.mark.parametrize("key_object", [TEXT, LATENTS])
def test_every_part_changes_the_key(key_object):
    keys = {key_of(key_object)}
    for part in key_object:
        keys.add(key_of({**key_object, part: "something else"}))
        keys.add(key_of({name: value for name, value in key_object.items() if name != part}))
    assert len(keys) == 1 + 2 * len(key_object)


def test_composed_and_decomposed_captions_are_different_entries():
    assert key_of({"caption": "\u00e9"}) != key_of({"caption": "e\u0301"})


def test_true_is_not_one():
    assert key_of({"flip": True}) != key_of({"flip": 1})


class _Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (0.5, "$.a"),
        (float("nan"), "$.a"),
        ((1, 2), "$.a"),
        ({1}, "$.a"),
        (b"x", "$.a"),
        (np.int64(3), "$.a"),
        (np.str_("x"), "$.a"),
        (_Number.ONE, "$.a"),
        (OrderedDict(x=1), "$.a"),
        ([1, [2, 3.0]], "$.a[1][1]"),
        ({"b": {"c": 1.0}}, "$.a.b.c"),
        ({1: "x"}, "$.a"),
    ],
)
def test_other_types_are_refused_with_their_place(value, where):
    with pytest.raises(TypeError) as error:
        key_of({"a": value})
    assert str(error.value).startswith(where + ":")


@pytest.mark.parametrize("key_object", [{"a": "x\udc80"}, {"x\udc80": "a"}])
def test_invalid_unicode_is_the_users_error(key_object):
    with pytest.raises(InputError, match="UTF-8"):
        key_of(key_object)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(_json)
def test_canonical_json_reads_back_and_says_one_thing_only(value):
    text = canonical(value)
    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), _json, max_size=4))
def test_order_of_names_does_not_matter(value):
    turned = dict(reversed(value.items()))
    assert key_of(turned) == key_of(value) == hashlib.sha256(canonical(value).encode()).hexdigest()
    assert KEY.fullmatch(key_of(value))
