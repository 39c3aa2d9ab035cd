"""A set: the list of entries that one config needs, and the only thing training has to be told.

It is the progress record of encoding, the pin against `gc`, and the input of training, in one group.
Its body is `{name, request, identities, shared: {empty, prefix, pad}, samples, prompts}`; its key hashes it.
    sample  {id, text: [key], latents: [{key, h, w, references: [key], mask: key | null}], repeats, prior}
    prompt  {text, negative, references: [key], size, seed}        text and negative are keys too
"""

import gc
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from flux2_relay.cache.encoding import Damage, build_group, parse_object, plain
from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import key_of

_AT = re.compile(rb'"made":\{[^{}]*?"at":"([^"]*)"')
_QUOTED_KEY = re.compile(rb'"([0-9a-f]{64})"')


@dataclass(frozen=True, kw_only=True, slots=True)
class SetRecord:
    """One set as it stands in the store."""

    key: str
    body: Mapping[str, Any]
    """name, request, identities, shared, samples, prompts: all that the key is the hash of."""
    made: Mapping[str, Any]
    """When and by what it was published last; told, never hashed."""

    @property
    def name(self) -> str:
        """The name the user knows it by."""
        return str(self.body.get("name", ""))

    @property
    def at(self) -> str:
        """When it was published last: UTC in ISO 8601, so that the order of text is that of time."""
        return str(self.made.get("at", ""))


def build_set(body: Mapping[str, object], made: Mapping[str, object]) -> tuple[str, bytes]:
    """Encode a set -> its key and its zarr.json."""
    if "made" in body:
        raise InputError("a set's body has no 'made' of its own: give it apart, it is not hashed")
    key = key_of(body)
    node = parse_object(build_group({})) | {"attributes": {**body, "made": plain(made)}}
    return key, _text(node)


def parse_set(zarr_json: bytes, key: str) -> SetRecord:
    """Decode a set: zarr.json -> SetRecord, or Damage when its name is not the hash of its body."""
    with _no_collector():
        metadata = parse_object(zarr_json)
    body = dict(metadata.get("attributes", {}))
    made = body.pop("made", None)
    if metadata.get("node_type") != "group" or not isinstance(made, dict):
        raise Damage("its zarr.json does not describe a set")
    try:
        name = key if _says(zarr_json, made, key) else key_of(body)
    except (TypeError, InputError) as error:
        raise Damage(f"its body cannot be hashed ({error})") from error
    if name != key:
        raise Damage(f"its body hashes to {name}")
    return SetRecord(key=key, body=body, made=made)


def needs(body: Mapping[str, Any]) -> dict[str, list[str]]:
    """List every entry that a set needs -> keys by kind, each once, in order of first mention."""
    found: dict[str, dict[str, None]] = {"text": {}, "latents": {}, "masks": {}}
    for kind, key in _mentions(body):
        if key is not None:
            found[kind][key] = None
    return {kind: list(keys) for kind, keys in found.items()}


def pinned(zarr_json: bytes) -> set[str]:
    """Find whatever looks like a key in a set's zarr.json; what a set so much as mentions, `gc` spares."""
    return {match.decode() for match in _QUOTED_KEY.findall(zarr_json)}


def later(at: str, zarr_jsons: Iterable[bytes]) -> str:
    """A time, or where it is not after all those of these sets, the moment after them: UTC in ISO 8601.

    Machines' clocks differ, and one that starts without its battery says 1970.
    """
    newest = max((match[1].decode() for text in zarr_jsons if (match := _AT.search(text))), default="")
    if newest < at:
        return at
    try:
        return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat()
    except (ValueError, OverflowError):  # not written by us
        return at


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's garbage collector out: a million new objects, none of them garbage, take it twice the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _says(zarr_json: bytes, made: Mapping[str, Any], key: str) -> bool:
    """Hash the body as it stands in the text: without `made` what `build_set` writes is canonical already.

    With 100,000 samples this takes a hundredth of the time of writing the body anew; a text of another form is no
    fault, only slower.
    """
    told = b'"made":' + _text(made)
    start, end = len(b'{"attributes":'), zarr_json.rfind(b',"node_type":')
    at = zarr_json.find(told, start, end)
    if at < 0:
        return False
    before, after = at, at + len(told)  # without one of the commas around it
    if zarr_json[after : after + 1] == b",":
        after += 1
    elif zarr_json[before - 1 : before] == b",":
        before -= 1
    text = memoryview(zarr_json)  # cut, not copied
    sha = hashlib.sha256(text[start:before])
    sha.update(text[after:end])
    return sha.hexdigest() == key


def _mentions(body: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    for key in (body.get("shared") or {}).values():
        yield "text", key
    for sample in body.get("samples", ()):
        yield from (("text", key) for key in sample.get("text", ()))
        for latents in sample.get("latents", ()):
            yield "latents", latents["key"]
            yield from (("latents", key) for key in latents.get("references", ()))
            yield "masks", latents.get("mask")
    for prompt in body.get("prompts", ()):
        yield "text", prompt.get("text")
        yield "text", prompt.get("negative")
        yield from (("latents", key) for key in prompt.get("references", ()))
