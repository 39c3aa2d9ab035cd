"""`relay cache export`: one entry whole, as other programs take it."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flux2_relay.cache import Store
from flux2_relay.cache.errors import InputError, StoreError
from flux2_relay.cache.keys import key_of
from flux2_relay.cache.sets import needs
from flux2_relay.pipeline import cache_commands as common
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.place import Where

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True, kw_only=True, slots=True)
class Which:
    """The entry that the user asks for, in one of three ways."""

    caption: str | None = None
    image: Path | None = None
    key: str | None = None


def export(where: Where, which: Which, output: Path, as_json: bool) -> None:
    """Write an entry as `context` [T, C] or `latents` [H/16, W/16, 128], float32, to a safetensors file."""
    from flux2_relay.stages import files

    store, config = where.open()
    kind, key = _find(store, config, which)
    name, array = whole(store, kind, key)
    files.write_tensors(output, {name: array}, {"flux2_relay.key": key})
    if as_json:
        common.print_json({"kind": kind, "key": key, "tensor": name, "shape": array.shape, "file": str(output)})
    else:
        shape = ", ".join(map(str, array.shape))
        click.echo(f"{output}: {name} [{shape}] float32, entry {kind}/{key[: common.SHORT]}")


def whole(store: Store, kind: str, key: str) -> "tuple[str, mx.array]":
    """An entry whole -> tensor's name, array float32; a caption's own rows with prefix and pads around them."""
    import mlx.core as mx

    from flux2_relay.stages.train.contexts import Contexts, stored, to_mlx

    entry = store.read(kind, key)
    if kind != "text":
        return kind, to_mlx(entry).astype(mx.float32)
    key_object = entry.attributes["key"]
    if key_object["rows"] in ("prefix", "pad"):
        return "rows", to_mlx(entry).astype(mx.float32)
    prefix, pad = None, None
    if key_object["rows"] == "own":
        prefix, pad = (to_mlx(store.read("text", _shared_key(key_object, rows))) for rows in ("prefix", "pad"))
    contexts = Contexts(store, key, prefix, pad, int(key_object["max_length"]))
    return "context", contexts.whole(stored(entry)).astype(mx.float32)


def _shared_key(key_object: Mapping[str, object], rows: str) -> str:
    """The shared rows of an encoder differ from a caption's own in just two parts of the key."""
    return key_of({**key_object, "rows": rows, "caption": None})


def _find(store: Store, config: Config | None, which: Which) -> tuple[str, str]:
    if which.key is not None:
        return store.resolve(which.key, kinds=("text", "latents", "masks"))
    if which.caption is not None:
        return "text", _find_caption(store, config, which.caption)
    assert which.image is not None
    return "latents", _find_image(store, config, which.image)


def _find_caption(store: Store, config: Config | None, caption: str) -> str:
    """The entry of a caption; with a config also of one that still lacks the trigger word."""
    from flux2_relay.stages.encode.captions import clean

    found: dict[str, str] = {}
    for key_object, key in _candidates(store, config, "text"):
        if key_object["caption"] is not None:
            found.setdefault(str(key_object["caption"]), key)
    cleaned = [c for options in (config.data if config else ()) for c in clean(caption, "whole", options.trigger)]
    for asked in (caption, *cleaned):
        if asked in found:
            return found[asked]
    near = difflib.get_close_matches(caption, sorted(found), n=1, cutoff=0.3)
    hint = f"; the nearest one is {near[0]!r}" if near else ""
    raise InputError(f"{store.name} holds no caption {caption!r} that this asks for{hint}")


def _find_image(store: Store, config: Config | None, image: Path) -> str:
    from flux2_relay.stages import identity

    try:
        source = identity.file_sha256(image)
    except OSError as error:
        raise InputError(f"{image}: cannot be read: {error.strerror}") from error
    found: dict[str, Mapping[str, object]] = {}
    for key_object, key in _candidates(store, config, "latents"):
        if key_object["source"] == source:
            found[key] = key_object
    upright = {key: key_object for key, key_object in found.items() if not key_object["flip"]}
    if len(upright) == 1:
        return next(iter(upright))
    if not found:
        raise InputError(f"{store.name} holds no latents of {image} (of a file with just its bytes)")
    listed = "".join(f"\n  --key {key[: common.SHORT]}  crop {key_object['crop']}" for key, key_object in found.items())
    raise InputError(f"{image} is in the store several times; choose one:{listed}")


def _candidates(store: Store, config: Config | None, kind: str) -> Iterator[tuple[Mapping[str, object], str]]:
    """The entries of the config's set; without a config of all sets, the newest first."""
    from flux2_relay.pipeline.request import find_set

    records = store.sets() if config is None else [find_set(store, config)]
    seen: set[str] = set()
    for record in records:
        wanted: Sequence[str] = needs(record.body)[kind]
        for key in wanted:
            if key in seen:
                continue
            seen.add(key)
            try:
                yield store.header(kind, key).attributes["key"], key
            except StoreError:
                continue  # missing or damaged: it is not what is asked for, or else it will not be found
