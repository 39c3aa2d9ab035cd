"""Entries and sets from one store to another: only what is missing there, checked on both sides.

A pushed or pulled store is the same store: the very bytes are copied, so that both hold equal nodes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flux2_relay.cache import encoding
from flux2_relay.cache.audit import Fault, Progress
from flux2_relay.cache.encoding import Damage
from flux2_relay.cache.errors import RelayError
from flux2_relay.cache.sets import SetRecord
from flux2_relay.cache.store import KINDS, LOOK_AGAIN_SECONDS, Store

_THREADS = 4
_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """What went from one store to another."""

    entries: int
    sets: int
    stored_bytes: int
    present: int
    """Entries that were there before."""
    faults: tuple[Fault, ...]
    """Entries that are damaged where they came from; they were not copied."""


def copy(source: Store, target: Store, progress: Progress | None = None) -> Copied:
    """Copy every set and entry that `target` lacks -> Copied.

    The sets go first, so that `gc` over there spares their entries. Each entry is checked whole (crc32c, sha256)
    before it is sent and read back after it has arrived; RelayError for one that arrived otherwise.
    """
    sets = _copy_sets(source.sets(), target)
    wanted = {kind: source.keys(kind) for kind in KINDS}
    lacking = [(kind, key) for kind in KINDS for key in sorted(wanted[kind] - target.keys(kind))]
    faults: list[Fault] = []
    stored_bytes = 0
    collected = 0
    for done, (name, size) in enumerate(_copy_all(source, target, lacking), start=1):
        if size is None:
            collected += 1
        elif isinstance(size, str):
            faults.append(Fault(kind=name[0], key=name[1], reason=size, repaired=False))
        else:
            stored_bytes += size
        if progress is not None:
            progress(done, len(lacking))
    return Copied(
        entries=len(lacking) - len(faults) - collected,
        sets=sets,
        stored_bytes=stored_bytes,
        present=sum(map(len, wanted.values())) - len(lacking),
        faults=tuple(faults),
    )


def _copy_sets(records: list[SetRecord], target: Store) -> int:
    there = {record.key: record.at for record in target.sets()}
    lacking = [record for record in records if there.get(record.key, "") < record.at or record.key not in there]
    for record in lacking:  # one that is older over there is asked for last here, and so it must be there
        target.publish_set(record.body, record.made)
    return len(lacking)


def _copy_all(
    source: Store, target: Store, names: list[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], int | str | None]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            yield from zip(batch, pool.map(lambda name: _copy(source, target, *name), batch), strict=True)


def _read(source: Store, kind: str, key: str) -> dict[str, bytes]:
    """Read an entry as its files; `gc` may be about to put it back."""
    names = encoding.file_names(kind)
    try:
        return source.nodes.read(kind, key, names)
    except FileNotFoundError:
        source.wait(LOOK_AGAIN_SECONDS)
        return source.nodes.read(kind, key, names)


def _copy(source: Store, target: Store, kind: str, key: str) -> int | str | None:
    """Copy one entry -> its size, or what is wrong with it, or None where `gc` has collected it meanwhile."""
    try:
        node = _read(source, kind, key)
        encoding.check_content(encoding.decode(node, kind, key))
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}" if source.nodes.exists(kind, key) else None
    except OSError as error:
        raise RelayError(f"{source.name}/{kind}/{key} cannot be read: {error.strerror}.") from error
    except Damage as damage:
        return str(damage)
    target.publish_node(kind, key, node)
    wrong = target.examine(kind, key)
    if wrong is not None:
        raise RelayError(
            f"{target.name}/{kind}/{key} did not arrive as it was sent: {wrong}. Run `relay cache verify --repair` "
            "there, then this command again."
        )
    return sum(map(len, node.values()))
