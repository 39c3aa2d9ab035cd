"""What an entry depends on, as one number: canonical JSON, hashed.

This file only canonicalises and hashes; which facts belong into the key of a text or of latents is written
where they are encoded. `tests/unit/cache/test_keys.py` pins the values: a key that moves orphans every store.
"""

import hashlib
import json
import re
from collections.abc import Mapping

from flux2_relay.cache.errors import InputError

KEY = re.compile(r"[0-9a-f]{64}")
"""A key: SHA-256 in 64 lower-case hexadecimal digits."""
_PLAIN = frozenset((str, int, bool))
_write = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def canonical(value: object) -> str:
    """Write `value` as the one JSON text that stands for it.

    dict, list, str, int, bool, None -> str: names sorted by code point, no spaces, no needless escapes.
    Floats are refused (their decimal form is a matter of taste), and so is any type that would come back from
    JSON as another.
    """
    if not _is_plain(value):
        _refuse(value, "$")
    text = _write(value)
    if not text.isascii():
        _refuse(value, "$")
    return text


def key_of(key_object: Mapping[str, object]) -> str:
    """Hash an object by its canonical JSON: dict -> 64 hexadecimal digits, the name of the entry."""
    return hashlib.sha256(canonical(dict(key_object)).encode()).hexdigest()


def _is_plain(value: object) -> bool:
    """Whether `_refuse` lets it pass but for its texts: as quickly as can be, for ten thousand keys."""
    kind = type(value)
    if kind is dict:
        return all(type(name) is str for name in value) and all(map(_is_plain, value.values()))  # pyright: ignore
    if kind is list:
        return all(map(_is_plain, value))  # pyright: ignore[reportArgumentType]
    return value is None or kind in _PLAIN


def _refuse(value: object, where: str) -> None:
    """Raise for the first part of `value` that has no canonical form, saying where it is."""
    # Exact types: a tuple or an enum would come back from JSON as something else, True is not the number 1.
    if value is None or type(value) in (bool, int):
        return
    if type(value) is str:
        _refuse_surrogates(value, where)
    elif type(value) is list:
        for index, item in enumerate(value):
            _refuse(item, f"{where}[{index}]")
    elif type(value) is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise TypeError(f"{where}: a key object's names are strings, not {type(name).__name__} ({name!r})")
            _refuse_surrogates(name, where)
            _refuse(item, f"{where}.{name}")
    else:
        raise TypeError(
            f"{where}: {type(value).__name__} ({value!r}) cannot be part of a key; "
            "use strings, integers, booleans, None, lists and dicts"
        )


def _refuse_surrogates(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {text!r} is not valid Unicode (a lone surrogate at character {error.start}); "
            "save the file it came from as UTF-8"
        ) from error
