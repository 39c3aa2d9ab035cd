"""Safetensors and JSON out: bytes first, name last, read back before anybody is told that they are there."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx

from flux2_relay.cache import durable
from flux2_relay.cache.errors import InputError, RelayError


def write_tensors(
    path: Path,
    values: Mapping[str, mx.array],
    metadata: Mapping[str, str],
    prove: Callable[[Path], None] = lambda aside: None,
) -> None:
    """A safetensors file, whole under its name or not there at all: written aside, synced, read back, renamed.

    `prove` looks at it before it has its name and raises where it is not what it should be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".new-", suffix=".safetensors", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        _save(aside, values, metadata)
        _sync(aside)
        _compare(aside, values)
        prove(aside)
        os.replace(aside, path)
        durable.sync_folder(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors, evaluated, and the metadata of a safetensors file; InputError where it is not whole."""
    try:
        values, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True))
        mx.eval(values)
    except (RuntimeError, OSError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        why = str(error) if size else "it is empty"
        raise InputError(f"{path}: cannot be read ({why}); it is cut off, damaged or no safetensors file") from None
    return values, metadata


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """A new small JSON file, synced."""
    durable.write_and_sync(path, json.dumps(value, indent=1).encode())


def _save(file: Path, values: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    try:
        mx.save_safetensors(str(file), dict(values), dict(metadata))
    except RuntimeError as error:
        if not str(error).startswith(("[write]", "[save")):  # a failing device, not a full disk
            raise
        raise RelayError(f"{file.parent}: cannot be written to ({error}); is the disk full?") from None


def _compare(file: Path, values: Mapping[str, mx.array]) -> None:
    written = mx.load(str(file))
    assert isinstance(written, dict)
    same = written.keys() == values.keys() and all(mx.array_equal(written[name], values[name]) for name in values)
    if not same:
        raise RelayError(f"{file} does not hold what was written to it; is the disk or network folder failing?")


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
