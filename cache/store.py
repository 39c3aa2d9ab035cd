"""The store: a folder that is one ordinary Zarr v3 hierarchy, read and written one whole entry at a time.

    store.zarr/zarr.json              group: {"format": "flux2-relay-cache", "version": 1}
    store.zarr/text/KEY/...           arrays, a folder and two files each; latents/ and masks/ alike
    store.zarr/sets/KEY/zarr.json     groups: what one config needs
    store.zarr/tmp/...                being built or thrown away; nothing in here counts

The folder is the index; an entry exists, whole, exactly when its folder does. Nothing is locked or appended
to, so any number of processes may read, write and collect garbage at once.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from flux2_relay.cache import durable, encoding
from flux2_relay.cache.encoding import Damage, Entry, Header
from flux2_relay.cache.errors import RelayError, StoreError
from flux2_relay.cache.keys import KEY, key_of
from flux2_relay.cache.sets import SetRecord, build_set, needs, parse_set

FORMAT = "flux2-relay-cache"
VERSION = 1
KINDS = tuple(encoding.DIMENSIONS)
"""text, latents, masks."""

_GROUPS = (*KINDS, "sets", "tmp")
_REPAIR = "Run `relay cache verify --repair`, then `relay encode`."
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_BROKEN = {errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENOENT}  # the entry's own fault
_LOOK_AGAIN_SECONDS = 1.0  # gc takes an unused entry out of sight for a moment before it looks a second time


@dataclass(frozen=True, slots=True)
class Store:
    """An open store. Safe to share between threads: it holds no state but where it is and how to write."""

    path: Path
    mode: Literal["r", "a"] = "r"
    codec: str = "zstd"
    wait: Callable[[float], None] = field(default=time.sleep, repr=False)

    def keys(self, kind: str) -> set[str]:
        """List a kind by one scan of its folder -> keys."""
        return set(self._scan(_known(kind)))

    def has(self, kind: str, key: str) -> bool:
        """Say whether an entry exists."""
        return self._place(kind, key).is_dir()

    def read(self, kind: str, key: str) -> Entry:
        """Read and check (crc32c) an entry -> Entry, or StoreError naming it and what to do.

        An entry that is not there is looked for again after a second: `gc` may be about to put it back.
        """
        place = self._place(_known(kind), key)
        try:
            try:
                node = _read_node(place, encoding.chunk_name(kind))
            except FileNotFoundError:
                self.wait(_LOOK_AGAIN_SECONDS)
                node = _read_node(place, encoding.chunk_name(kind))
            return encoding.decode(node, kind, key)
        except FileNotFoundError as error:
            if not place.exists():
                raise StoreError(f"{place} is missing. Run `relay encode`.") from error
            raise StoreError(f"{place} is damaged: it has no {Path(error.filename).name}. {_REPAIR}") from error
        except (Damage, OSError) as error:
            raise _refused(place, error) from error

    def header(self, kind: str, key: str) -> Header:
        """Read what an entry's zarr.json says, one small file -> Header, or StoreError."""
        place = self._place(_known(kind), key)
        try:
            return encoding.parse_header((place / "zarr.json").read_bytes(), kind, key)
        except (Damage, OSError) as error:
            raise _refused(place, error) from error

    def examine(self, kind: str, key: str, full: bool = True) -> str | None:
        """Look for damage in an entry or a set -> what is wrong with it, or None.

        Quick: metadata, name and size of the chunk. Full: also decode, crc32c, sha256, finite values.
        """
        place = self._place(kind, key)
        try:
            if kind == "sets":
                parse_set((place / "zarr.json").read_bytes(), key)
            elif full:
                encoding.check_content(encoding.decode(_read_node(place, encoding.chunk_name(kind)), kind, key))
            else:
                size = (place / encoding.chunk_name(kind)).stat().st_size
                encoding.parse_header((place / "zarr.json").read_bytes(), kind, key, size)
        except FileNotFoundError as error:
            return f"it has no {Path(error.filename).name}" if place.exists() else None
        except OSError as error:
            if error.errno not in _BROKEN:  # too many open files, no permission: not the entry's fault
                raise StoreError(f"{place} cannot be read: {error.strerror}.") from error
            return error.strerror
        except Damage as damage:
            return str(damage)
        return None

    def publish(
        self, kind: str, key_object: Mapping[str, object], array: np.ndarray, made: Mapping[str, object]
    ) -> str:
        """Make an entry readable and durable, all of it or none -> its key.

        array: float16, float32, or uint16 bits with key_object["dtype"] == "bfloat16"; finite, or InputError.
        An entry that is already there stays as it is. `made` is told, never hashed.
        """
        self._must_write()
        if key_object.get("kind", kind) != kind:
            raise StoreError(f"a key of kind {key_object['kind']!r} cannot name an entry of kind {kind!r}")
        key = key_of(key_object)
        place = self._place(_known(kind), key)
        if self.has(kind, key):
            with self._told(f"{kind}/{key}", 0):
                durable.sync_folder(place.parent)  # whoever made it may not have got that far
            return key
        node = encoding.build(kind, key_object, array, made, self.codec)
        with self._told(f"{kind}/{key}", sum(map(len, node.values()))):
            durable.publish_folder(node, self.path / "tmp", place)
        return key

    def remove(self, kind: str, key: str) -> None:
        """Delete an entry or a set; readers see all of it or nothing. StoreError if it is not there."""
        aside = self.set_aside(kind, key)
        if aside is None:
            raise StoreError(f"{self._place(kind, key)} is missing, so it cannot be removed.")
        durable.remove_folder(aside)

    def set_aside(self, kind: str, key: str) -> Path | None:
        """Take an entry or a set out of sight, into tmp -> where it is now, or None if it was not there."""
        self._must_write()
        with self._told(f"{kind}/{key}", 0):
            return durable.set_aside(self._place(kind, key), self.path / "tmp")

    def put_back(self, aside: Path, kind: str, key: str) -> None:
        """Undo `set_aside`; an entry published anew in between stays."""
        with self._told(f"{kind}/{key}", 0):
            durable.put_back(aside, self._place(kind, key))

    def publish_set(self, body: Mapping[str, object], made: Mapping[str, object]) -> str:
        """Publish a set -> its key. `made["at"]`, UTC in ISO 8601, orders the sets.

        Do it before looking for what is missing: from then on `gc` leaves its entries alone. A set that is
        there already gets the new `made`, so that the newest set is always the one asked for last.
        """
        self._must_write()
        key, zarr_json = build_set(body, made)
        place, tmp = self._place("sets", key), self.path / "tmp"
        with self._told(f"sets/{key}", len(zarr_json)):
            while not durable.publish_folder({"zarr.json": zarr_json}, tmp, place):
                if durable.replace_file(zarr_json, tmp, place / "zarr.json"):
                    break  # else it was dropped between the two calls
        return key

    def sets(self) -> list[SetRecord]:
        """Read every set -> records, newest first. StoreError for a damaged one."""
        records = [record for key in self._scan("sets") if (record := self._read_set(key)) is not None]
        return sorted(records, key=lambda record: (record.at, record.key), reverse=True)

    def set_keys(self) -> set[str]:
        """List the sets by one scan, without reading them -> keys."""
        return set(self._scan("sets"))

    def open_set(self, prefix: str) -> SetRecord:
        """Read the one set whose key begins with `prefix`, or StoreError."""
        _, key = self.resolve(prefix, kinds=("sets",))
        record = self._read_set(key)
        if record is None:
            raise StoreError(f"{self._place('sets', key)} has just been removed.")
        return record

    def missing(self, record: SetRecord, patient: bool = True) -> dict[str, list[str]]:
        """List what a set needs and the store lacks -> keys by kind, in the set's order; empty when complete.

        `patient`: look again after a second before saying so, as one who is about to complain should; an
        encoder that will simply fill the gaps passes False.
        """
        lacking = self._lacking(needs(record.body))
        if lacking and patient:
            self.wait(_LOOK_AGAIN_SECONDS)
            lacking = self._lacking(lacking)
        return lacking

    def resolve(self, prefix: str, kinds: tuple[str, ...] = (*KINDS, "sets")) -> tuple[str, str]:
        """Find the one entry or set whose key begins with `prefix` -> (kind, key), or StoreError."""
        found = [(kind, key) for kind in kinds for key in self._scan(kind) if key.startswith(prefix.lower())]
        if len(found) == 1:
            return found[0]
        if not found:
            raise StoreError(f"{self.path} has nothing in {', '.join(kinds)} whose key begins with {prefix!r}.")
        some = ", ".join(f"{kind}/{key[:16]}" for kind, key in sorted(found)[:5])
        raise StoreError(f"{len(found)} keys begin with {prefix!r} ({some}, ...); give more digits.")

    def _lacking(self, wanted: Mapping[str, list[str]]) -> dict[str, list[str]]:
        there = {kind: self.keys(kind) for kind, keys in wanted.items() if keys}
        lacking = {kind: [key for key in wanted[kind] if key not in keys] for kind, keys in there.items()}
        return {kind: keys for kind, keys in lacking.items() if keys}

    def _read_set(self, key: str) -> SetRecord | None:
        place = self._place("sets", key)
        try:
            return parse_set((place / "zarr.json").read_bytes(), key)
        except FileNotFoundError as error:
            if not place.exists():
                return None  # dropped since the scan
            raise StoreError(f"{place} is damaged: it has no zarr.json. {_REPAIR}") from error
        except (Damage, OSError) as error:
            raise _refused(place, error) from error

    def _scan(self, kind: str) -> Iterator[str]:
        try:
            with os.scandir(self.path / kind) as names:
                yield from (name.name for name in names if KEY.fullmatch(name.name))
        except OSError as error:
            raise StoreError(f"{self.path / kind} cannot be listed: {error.strerror}.") from error

    def _place(self, kind: str, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise StoreError(f"{key!r} is not a key: a key is 64 lower-case hexadecimal digits.")
        return self.path / kind / key

    def _must_write(self) -> None:
        if self.mode != "a":
            raise StoreError(f"{self.path} was opened for reading only.")

    @contextmanager
    def _told(self, name: str, size: int) -> Iterator[None]:
        """Turn an OSError into a sentence; whatever was committed before stays."""
        try:
            yield
        except OSError as error:
            if error.errno in _READ_ONLY:
                raise _read_only(self.path, error) from error
            raise RelayError(
                f"{self.path / name}: writing {size:,} bytes failed ({error.strerror}). What was committed "
                "before is kept; make room or mend the disk, then run the command again: it continues."
            ) from error


def open(
    path: str | os.PathLike[str],
    mode: Literal["r", "a"] = "r",
    *,
    codec: str = "zstd",
    wait: Callable[[float], None] = time.sleep,
) -> Store:
    """Open a store -> Store, or StoreError.

    "r" creates nothing. "a" makes the store if there is none, and tries at once whether it can write.
    `codec` ("zstd" or "none") is for new entries only; readers need not know. `wait` is for tests.
    """
    if mode not in ("r", "a") or codec not in encoding.CODECS:
        raise ValueError(f"mode {mode!r}, codec {codec!r}: mode is 'r' or 'a', codec is one of {encoding.CODECS}")
    if "://" in os.fspath(path):
        raise StoreError(f"{os.fspath(path)}: only folders on a file system are supported as a store.")
    root = Path(path).expanduser().resolve()
    if mode == "a":
        _create_if_absent(root)
    _check_root(root)
    if mode == "a":
        _complete_and_try(root)
    return Store(root, mode, codec, wait)


def _create_if_absent(root: Path) -> None:
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        return
    groups = {"zarr.json": encoding.build_group({"format": FORMAT, "version": VERSION})}
    groups |= {f"{name}/zarr.json": encoding.build_group({}) for name in _GROUPS}
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        durable.publish_folder(groups, root.parent, root)
    except OSError as error:
        raise StoreError(f"{root} cannot be created: {error.strerror}.") from error


def _check_root(root: Path) -> None:
    """Refuse whatever is not a store of this version, saying what it is instead."""
    if not root.exists():
        raise StoreError(f"{root} does not exist. Run `relay encode` to make it, or correct `cache.path`.")
    if not root.is_dir():
        raise StoreError(f"{root} is a file; a store is a folder. Correct `cache.path`.")
    try:
        attributes = encoding.parse_object((root / "zarr.json").read_bytes()).get("attributes", {})
    except FileNotFoundError as error:
        old = any((root / name).exists() for name in (".zgroup", ".zarray"))
        what = "a Zarr of format 2" if old else "a folder without zarr.json"
        raise StoreError(f"{root} is not a store: it is {what}. Correct `cache.path`.") from error
    except (Damage, OSError) as error:
        raise StoreError(f"{root} cannot be read as a store: {error}.") from error
    if attributes.get("format") != FORMAT:
        raise StoreError(f"{root} is a Zarr hierarchy, but not a store of this program. Correct `cache.path`.")
    version = attributes.get("version")
    if type(version) is not int or version != VERSION:
        raise StoreError(
            f"{root} is a store of version {version}; this program reads version {VERSION}. "
            "Use the release that wrote it, or another `cache.path`."
        )


def _complete_and_try(root: Path) -> None:
    """Put back group folders that a copy left out, and find out now whether the store can be written."""
    try:
        for name in _GROUPS:
            if not (root / name / "zarr.json").is_file():
                _restore_group(root, root / name)
        durable.probe(root / "tmp")
    except OSError as error:
        if error.errno in _READ_ONLY:
            raise _read_only(root, error) from error
        raise RelayError(f"{root} cannot be written: {error.strerror}.") from error


def _restore_group(root: Path, group: Path) -> None:
    files = {"zarr.json": encoding.build_group({})}
    if not group.exists():
        durable.publish_folder(files, root, group)
    else:
        durable.write_and_sync(group / "zarr.json", files["zarr.json"])


def _refused(place: Path, error: Damage | OSError) -> StoreError:
    if isinstance(error, OSError) and error.errno not in _BROKEN:
        return StoreError(f"{place} cannot be read: {error.strerror}.")
    return StoreError(f"{place} is damaged: {error}. {_REPAIR}")


def _read_only(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be written ({error.strerror}). Training only reads; to encode, make it writable or "
        "choose another `cache.path`."
    )


def _read_node(place: Path, chunk_name: str) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in (chunk_name, "zarr.json")}


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise StoreError(f"there is no kind {kind!r}; a store holds {', '.join(KINDS)}.")
    return kind
