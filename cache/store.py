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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from flux2_relay.cache import durable, encoding, nodes
from flux2_relay.cache.encoding import Damage, Entry, Header
from flux2_relay.cache.errors import RelayError, StoreError
from flux2_relay.cache.keys import KEY, key_of
from flux2_relay.cache.nodes import Folder, Nodes
from flux2_relay.cache.sets import SetRecord, build_set, later, needs, parse_set

KINDS = tuple(encoding.DIMENSIONS)
"""text, latents, masks."""

_REPAIR = "Run `relay cache verify --repair`, then `relay encode`."
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_BROKEN = {errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENOENT}  # the entry's own fault
LOOK_AGAIN_SECONDS = 1.0
"""How long `gc` may keep an unused entry out of sight before it looks a second time."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open store. Safe to share between threads: it holds no state but where it is and how to write."""

    nodes: Nodes
    mode: Literal["r", "a"] = "r"
    codec: str = "zstd"
    wait: Callable[[float], None] = field(default=time.sleep, repr=False)

    @property
    def name(self) -> str:
        """What the user calls it: its path, or its URL."""
        return self.nodes.name

    @property
    def path(self) -> Path:
        """Its folder; of a remote store the folder on this machine that holds copies."""
        return self.nodes.path

    def keys(self, kind: str) -> set[str]:
        """List a kind by one scan of its folder -> keys."""
        return set(self._scan(_known(kind)))

    def has(self, kind: str, key: str) -> bool:
        """Say whether an entry exists."""
        return self.nodes.has(kind, _checked(key))

    def read(self, kind: str, key: str) -> Entry:
        """Read and check (crc32c) an entry -> Entry, or StoreError naming it and what to do.

        An entry that is not there is looked for again after a second: `gc` may be about to put it back.
        """
        files = encoding.file_names(_known(kind))
        try:
            try:
                node = self.nodes.fetch(kind, _checked(key), files)
            except FileNotFoundError:
                self.wait(LOOK_AGAIN_SECONDS)
                node = self.nodes.fetch(kind, key, files)
            try:
                return encoding.decode(node, kind, key)
            except Damage:
                if not self.nodes.forget(kind, key):
                    raise
                return encoding.decode(self.nodes.fetch(kind, key, files), kind, key)  # only the copy may be damaged
        except FileNotFoundError as error:
            if not self.nodes.exists(kind, key):
                raise self._gone(kind, key) from error
            lost = Path(error.filename).name
            raise StoreError(f"{self._called(kind, key)} is damaged: it has no {lost}. {_REPAIR}") from error
        except (Damage, OSError) as error:
            raise self._refused(kind, key, error) from error

    def header(self, kind: str, key: str) -> Header:
        """Read what an entry's zarr.json says, one small file -> Header, or StoreError."""
        try:
            return encoding.parse_header(self._zarr_json(_known(kind), _checked(key)), kind, key)
        except FileNotFoundError as error:
            raise self._refused(kind, key, error) if self.nodes.exists(kind, key) else self._gone(kind, key) from error
        except (Damage, OSError) as error:
            raise self._refused(kind, key, error) from error

    def examine(self, kind: str, key: str, full: bool = True) -> str | None:
        """Look for damage in an entry or a set -> what is wrong with it, or None.

        Quick: metadata, name and size of the chunk. Full: also decode, crc32c, sha256, finite values.
        """
        _checked(key)
        try:
            if full or kind == "sets":
                _check(kind, key, self.nodes.read(kind, key, _files(kind)))
            else:
                zarr_json = self._zarr_json(kind, key)
                encoding.parse_header(zarr_json, kind, key, self.nodes.size(kind, key, encoding.chunk_name(kind)))
        except FileNotFoundError as error:
            return f"it has no {Path(error.filename).name}" if self.nodes.exists(kind, key) else None
        except OSError as error:
            if error.errno not in _BROKEN:  # too many open files, no permission: not the entry's fault
                raise self._refused(kind, key, error) from error
            return error.strerror
        except Damage as damage:
            return str(damage)
        return None

    def stored_bytes(self, kind: str, key: str) -> int:
        """What an entry takes on the disk, as far as it can be told."""
        total = 0
        for name in encoding.file_names(kind):
            with suppress(OSError):
                total += self.nodes.size(kind, key, name)
        return total

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
        with self._told(kind, key, 0):
            while self.nodes.exists(_known(kind), key):  # again: a repair may have taken it away while we looked
                if self.examine(kind, key) is not None and self.withdraw(kind, key):
                    break
                if self.has(kind, key):
                    self.nodes.confirm(kind)
                    return key
        self.publish_node(kind, key, encoding.build(kind, key_object, array, made, self.codec))
        return key

    def publish_node(self, kind: str, key: str, node: Mapping[str, bytes]) -> None:
        """Make an entry readable and durable that comes as its files, the chunk first."""
        self._must_write()
        with self._told(kind, key, sum(map(len, node.values()))):
            self.nodes.publish(kind, key, node)

    def remove(self, kind: str, key: str) -> None:
        """Delete an entry or a set; readers see all of it or nothing. StoreError if it is not there."""
        aside = self.set_aside(kind, key)
        if aside is None:
            raise StoreError(f"{self._called(kind, key)} is missing, so it cannot be removed.")
        durable.discard(aside)

    def withdraw(self, kind: str, key: str) -> bool:
        """Take what looked damaged out of sight -> False if it is not damaged after all, and so stays.

        `examine` may have looked while `gc` had it out of sight, or between two entries of this name; once it is
        aside nobody touches it any more.
        """
        aside = self.set_aside(kind, key)
        if aside is None or not is_whole(aside, kind, key):
            return True
        self.put_back(aside, kind, key)
        return False

    def set_aside(self, kind: str, key: str) -> Path | None:
        """Take an entry or a set out of sight, into tmp -> where it is now, or None if it was not there."""
        self._must_write()
        with self._told(kind, key, 0):
            return self.nodes.set_aside(kind, _checked(key))

    def put_back(self, aside: Path, kind: str, key: str) -> None:
        """Undo `set_aside`; an entry published anew in between stays."""
        with self._told(kind, key, 0):
            self.nodes.put_back(aside, kind, _checked(key))

    def publish_set(self, body: Mapping[str, object], made: Mapping[str, object]) -> str:
        """Publish a set -> its key. `made["at"]`, UTC in ISO 8601, orders the sets.

        Do it before looking for what is missing: from then on `gc` leaves its entries alone. A set that is
        there already gets the new `made`, so that the newest set is always the one asked for last.
        """
        self._must_write()
        key, zarr_json = build_set(body, made)
        with self._told("sets", key, len(zarr_json)):
            self.nodes.publish_set(key, zarr_json)
        return key

    def time_for_set(self, at: str) -> str:
        """`at`, or a moment later where a clock that is ahead of ours has published a set: UTC in ISO 8601.

        Whoever publishes a set with it has the newest one.
        """
        return later(at, self._set_texts())

    def sets(self) -> list[SetRecord]:
        """Read every set -> records, newest first. StoreError for a damaged one."""
        records = [record for key in self._scan("sets") if (record := self.read_set(key)) is not None]
        return sorted(records, key=lambda record: (record.at, record.key), reverse=True)

    def set_keys(self) -> set[str]:
        """List the sets by one scan, without reading them -> keys."""
        return set(self._scan("sets"))

    def open_set(self, prefix: str) -> SetRecord:
        """Read the one set whose key begins with `prefix`, or StoreError.

        One whose whole key is given is looked for again after a second: `gc` may be about to put it back.
        """
        if KEY.fullmatch(prefix):
            if (record := self.read_set(prefix)) is not None:
                return record
            self.wait(LOOK_AGAIN_SECONDS)
        _, key = self.resolve(prefix, kinds=("sets",))
        record = self.read_set(key)
        if record is None:
            raise StoreError(f"{self._called('sets', key)} has just been removed.")
        return record

    def read_set(self, key: str) -> SetRecord | None:
        """Read the set of this key -> None where there is none; StoreError for a damaged one."""
        try:
            return parse_set(self._zarr_json("sets", key), key)
        except FileNotFoundError as error:
            if not self.nodes.exists("sets", key):
                return None  # dropped since the scan
            raise StoreError(f"{self._called('sets', key)} is damaged: it has no zarr.json. {_REPAIR}") from error
        except (Damage, OSError) as error:
            raise self._refused("sets", key, error) from error

    def missing(self, record: SetRecord, patient: bool = True) -> dict[str, list[str]]:
        """List what a set needs and the store lacks -> keys by kind, in the set's order; empty when complete.

        `patient`: look again after a second before saying so, as one who is about to complain should; an
        encoder that will simply fill the gaps passes False.
        """
        lacking = self._lacking(needs(record.body))
        if lacking and patient:
            self.wait(LOOK_AGAIN_SECONDS)
            lacking = self._lacking(lacking)
        return lacking

    def resolve(self, prefix: str, kinds: tuple[str, ...] = (*KINDS, "sets")) -> tuple[str, str]:
        """Find the one entry or set whose key begins with `prefix` -> (kind, key), or StoreError."""
        found = [(kind, key) for kind in kinds for key in self._scan(kind) if key.startswith(prefix.lower())]
        if len(found) == 1:
            return found[0]
        if not found:
            raise StoreError(f"{self.name} has nothing in {', '.join(kinds)} whose key begins with {prefix!r}.")
        some = ", ".join(f"{kind}/{key[:16]}" for kind, key in sorted(found)[:5])
        raise StoreError(f"{len(found)} keys begin with {prefix!r} ({some}, ...); give more digits.")

    def _lacking(self, wanted: Mapping[str, list[str]]) -> dict[str, list[str]]:
        there = {kind: self.keys(kind) for kind, keys in wanted.items() if keys}
        lacking = {kind: [key for key in wanted[kind] if key not in keys] for kind, keys in there.items()}
        return {kind: keys for kind, keys in lacking.items() if keys}

    def _set_texts(self) -> Iterator[bytes]:
        for key in self._scan("sets"):
            with suppress(OSError, Damage):  # or just dropped
                yield self._zarr_json("sets", key)

    def _zarr_json(self, kind: str, key: str) -> bytes:
        return self.nodes.read(kind, key, ("zarr.json",))["zarr.json"]

    def _scan(self, kind: str) -> Iterator[str]:
        try:
            yield from (name for name in self.nodes.scan(kind) if KEY.fullmatch(name))
        except OSError as error:
            raise StoreError(f"{self.name}/{kind} cannot be listed: {error.strerror}.") from error

    def _called(self, kind: str, key: str) -> str:
        return f"{self.name}/{kind}/{key}"

    def _gone(self, kind: str, key: str) -> StoreError:
        return StoreError(f"{self._called(kind, key)} is missing. Run `relay encode`.")

    def _refused(self, kind: str, key: str, error: Damage | OSError) -> StoreError:
        if isinstance(error, OSError) and error.errno not in _BROKEN:
            return StoreError(f"{self._called(kind, key)} cannot be read: {error.strerror}.")
        return StoreError(f"{self._called(kind, key)} is damaged: {error}. {_REPAIR}")

    def _must_write(self) -> None:
        if self.mode != "a":
            raise StoreError(f"{self.name} was opened for reading only.")

    @contextmanager
    def _told(self, kind: str, key: str, size: int) -> Iterator[None]:
        """Turn an OSError into a sentence; whatever was committed before stays."""
        try:
            yield
        except OSError as error:
            if error.errno in _READ_ONLY:
                raise _read_only(self.name, error) from error
            raise RelayError(
                f"{self._called(kind, key)}: writing {size:,} bytes failed ({error.strerror}). What was committed "
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
        from flux2_relay.cache import remote  # only here: it needs the extra `remote`

        return Store(remote.open_nodes(os.fspath(path), mode), mode, codec, wait)
    root = Path(path).expanduser().resolve()
    if mode == "a":
        try:
            nodes.create_folder(root)
        except OSError as error:
            inside = f" It is made beside its place: name a folder in it, {root / 'store.zarr'}." * root.is_dir()
            raise StoreError(f"{root} cannot be created: {error.strerror}.{inside}") from error
    nodes.check_folder(root)
    if mode == "a":
        try:
            nodes.complete_folder(root)
        except OSError as error:
            if error.errno in _READ_ONLY:
                raise _read_only(str(root), error) from error
            raise RelayError(f"{root} cannot be written: {error.strerror}.") from error
    return Store(Folder(root), mode, codec, wait)


def is_whole(aside: Path, kind: str, key: str) -> bool:
    """Say whether what was taken out of sight is undamaged, all of it read."""
    try:
        _check(kind, key, nodes.read_folder(aside, _files(kind)))
    except (OSError, Damage):
        return False
    return True


def _check(kind: str, key: str, files: Mapping[str, bytes]) -> None:
    if kind == "sets":
        parse_set(files["zarr.json"], key)
    else:
        encoding.check_content(encoding.decode(files, kind, key))


def _files(kind: str) -> tuple[str, ...]:
    return ("zarr.json",) if kind == "sets" else encoding.file_names(kind)


def _read_only(name: str, error: OSError) -> StoreError:
    return StoreError(
        f"{name} cannot be written ({error.strerror}). Training only reads; to encode, make it writable or "
        "choose another `cache.path`."
    )


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise StoreError(f"there is no kind {kind!r}; a store holds {', '.join(KINDS)}.")
    return kind


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise StoreError(f"{key!r} is not a key: a key is 64 lower-case hexadecimal digits.")
    return key
