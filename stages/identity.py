"""What a set of weights or a file *is*: hashes of content, remembered so that a gigabyte is hashed once a machine.

A safetensors header holds names, types and offsets, which a fine-tune shares byte for byte; size and date say no
more. So identity is the SHA-256 of the bytes. Digests are remembered in the user's cache folder under everything the
file system knows of a file; for weights a tripwire besides, 64 small blocks spread over the file, since hours of
encoding hang on it. A folder that cannot be written only costs the time.
"""

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from flux2_relay.cache.durable import memory_folder
from flux2_relay.cache.errors import InputError
from flux2_relay.stages.weights import TensorInfo, Tensors

_BLOCK, _BLOCKS = 4096, 64
_CHUNK = 1 << 22
_AT_ONCE = 500  # findings written together: a commit waits for the disk
_SMALL = 1 << 30  # bytes hashed in about half a second
_SETTLED_SECONDS = 2.0  # the coarsest clock of a file system, FAT's: a file may change twice within one tick


def weights_identity(tensors: Tensors, names: Iterable[str], config: Mapping[str, object]) -> str:
    """SHA-256 over `name, type, shape, digest` of the tensors that a stage uses, and the config values that enter.

    Equal for sharded, single-file, renamed and fused layouts of the same weights; different for one changed weight.
    """
    names = sorted(names)
    infos = {name: tensors.info[name] for name in names}
    digests = tensor_digests(_with_scales(infos.values()))
    lines = [
        f"{name},{info.dtype},{'x'.join(map(str, info.shape))},"
        + ",".join(digests[name_of(one)] for one in _with_scales([info]))
        for name, info in infos.items()
    ]
    text = "\n".join([*lines, json.dumps(config, sort_keys=True)])
    return hashlib.sha256(text.encode()).hexdigest()


def name_of(info: TensorInfo) -> tuple[Path, str]:
    """What tells a tensor from all others on this machine: its file, its name there and, of a part, which rows."""
    rows = ",".join(f"{first}:{last}" for first, last in info.rows)
    return info.file, f"{info.name}[{rows}]" if rows else info.name


def _with_scales(infos: Iterable[TensorInfo]) -> Iterator[TensorInfo]:
    for info in infos:
        yield from filter(None, (info, info.scale))


def is_remembered(tensors: Tensors) -> bool:
    """Whether `weights_identity` would cost next to nothing: every file's digests are known here."""
    infos = list(_with_scales(tensors.info.values()))
    with Memo() as memo:
        for file in {info.file for info in infos}:
            known = json.loads(memo.get(_weights_key(file)) or "{}")
            if any(name_of(info)[1] not in known for info in infos if info.file == file):
                return False
    return True


def remember(tensors: Tensors, progress: Callable[[int], object]) -> None:
    """Hash what `weights_identity` will ask for; `progress` is told bytes. What an interruption leaves is kept."""
    part: list[TensorInfo] = []
    infos = sorted(_with_scales(tensors.info.values()), key=lambda info: (info.file, info.start))
    for number, info in enumerate(infos, start=1):
        part.append(info)
        size = sum(one.end - one.start for one in part)
        if size >= _SMALL or number == len(infos):
            tensor_digests(part)
            progress(size)
            part = []


def is_cheap(tensors: Tensors) -> bool:
    """Whether `weights_identity` takes a second at most: known here, or small."""
    return size_of(tensors) < _SMALL or is_remembered(tensors)


def size_of(tensors: Tensors) -> int:
    """Bytes of all tensors in their files."""
    return sum(info.end - info.start for info in tensors.info.values())


def tensor_digests(infos: Iterable[TensorInfo]) -> dict[tuple[Path, str], str]:
    """The SHA-256 of each tensor's bytes, from memory where the file is the same as before."""
    infos = list(infos)
    found: dict[tuple[Path, str], str] = {}
    with Memo() as memo:
        for file in sorted({info.file for info in infos}):
            wanted = [info for info in infos if info.file == file]
            key = _weights_key(file)
            known: dict[str, str] = json.loads(memo.get(key) or "{}")
            unknown = {name_of(info)[1]: info for info in wanted if name_of(info)[1] not in known}
            if unknown:
                with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing frees the interpreter
                    known |= dict(zip(unknown, pool.map(_tensor_digest, unknown.values()), strict=True))
                if _is_settled(file) and _weights_key(file) == key:
                    memo.put(key, json.dumps(known))
            found |= {name_of(info): known[name_of(info)[1]] for info in wanted}
    return found


def confirm(path: Path, sha256: object) -> None:
    """Raise InputError unless a file's bytes, read now, are those that were hashed before."""
    if _sha256(path) != sha256:
        raise InputError(f"{path}: was changed while this command ran; run it again")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, from memory where the file system says it is unchanged."""
    with Findings() as findings:
        return findings.sha256(path)


class Findings:
    """What was found out about files, from memory where the file system says they are unchanged; for many at once."""

    def __enter__(self) -> "Findings":
        """Open the memory."""
        self._memo, self._new = Memo().__enter__(), {}
        return self

    def __exit__(self, *error: object) -> None:
        """Keep what is new."""
        self._memo.put_all(self._new)
        self._memo.__exit__(*error)

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file's bytes."""
        return self.recall(path, "file", _sha256)

    def recall(self, path: Path, what: str, find: Callable[[Path], str]) -> str:
        """What `find` says of a file; `what` names the question, and its version if the answer may change."""
        key = f"{what}|{_facts(path)}"
        value = self._new.get(key) or self._memo.get(key)
        if value is None:
            value = find(path)
            if _is_settled(path) and f"{what}|{_facts(path)}" == key:
                self._new[key] = value
            if len(self._new) >= _AT_ONCE:  # so that a kill costs little of the work
                self._memo.put_all(self._new)
                self._new = {}
        return value


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _tensor_digest(info: TensorInfo) -> str:
    digest = hashlib.sha256()
    with open(info.file, "rb") as handle:
        for start, end in info.ranges:
            handle.seek(start)
            while start < end:
                data = handle.read(min(_CHUNK, end - start))
                if not data:
                    raise OSError(f"{info.file} became shorter while it was read")
                digest.update(data)
                start += len(data)
    return digest.hexdigest()


def _weights_key(file: Path) -> str:
    # In a Hugging Face cache the blob's name is the hash of its content: it holds on any machine.
    real = file.resolve()
    is_blob = real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name)
    return f"weights|{real.name if is_blob else _facts(file)}|{_tripwire(file)}"


def _facts(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"


def _is_settled(path: Path) -> bool:
    """Whether its last change is so long ago that another would show in its times."""
    stat = path.stat()
    return time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS


def _tripwire(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as handle:
        for block in range(_BLOCKS):
            handle.seek(block * max(0, size - _BLOCK) // (_BLOCKS - 1))
            digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


class Memo:
    """A small table on disk, shared by all processes of the user; every failure of it means "not remembered"."""

    def __enter__(self) -> "Memo":
        """Open it, if that can be done."""
        self._db: sqlite3.Connection | None = None
        try:
            memory_folder().mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(memory_folder() / "digests.sqlite", timeout=10)
            self._db.execute("create table if not exists memo (key text primary key, value text) without rowid")
        except (OSError, sqlite3.Error):
            self._close()
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self._close()

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = None

    def get(self, key: str) -> str | None:
        """What was put under a key, None where nothing was or nothing can be read."""
        if self._db is None:
            return None
        try:
            with closing(self._db.execute("select value from memo where key = ?", (key,))) as rows:
                row = rows.fetchone()
        except sqlite3.Error:
            return None
        return row[0] if row else None

    def put(self, key: str, value: str) -> None:
        """Remember a value."""
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, str]) -> None:
        """Remember many values in one go: a commit waits for the disk."""
        if self._db is None or not values:
            return
        try:
            with self._db:
                self._db.executemany("insert or replace into memo values (?, ?)", values.items())
        except sqlite3.Error:
            self._close()
