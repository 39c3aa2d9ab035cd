"""Looking after a store: verify what is in it, collect what no set needs, say how big it is.

Nothing here takes a lock. Encoding publishes its set and then looks for what is missing; `gc` takes an entry
out of sight and then looks for new sets. Whichever of the two came second sees the other.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flux2_relay.cache import durable
from flux2_relay.cache.encoding import Damage
from flux2_relay.cache.errors import StoreError
from flux2_relay.cache.nodes import Folder
from flux2_relay.cache.sets import SetRecord, needs, parse_set, pinned
from flux2_relay.cache.store import KINDS, Store, is_whole

_LEFTOVER_SECONDS = 24 * 3600  # no entry takes a day to write
_THREADS = 4  # blosc and sha256 free the GIL; a bucket keeps them waiting
_BATCH = 256  # entries in flight, so that a million of them are not a million futures

Progress = Callable[[int, int], None]
"""Told how many are done, of how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One damaged entry or set."""

    kind: str
    key: str
    reason: str
    repaired: bool
    """Taken out of sight, so that it is missing and `relay encode` makes it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What `verify` found."""

    checked: int
    faults: tuple[Fault, ...]
    missing: Mapping[str, int]
    """Entries that a set names and the store lacks, by set key; no damage."""
    leftovers: int
    """Children of tmp, of living writers, too; no damage."""

    @property
    def sound(self) -> bool:
        """True when nothing is damaged, or all that was has been repaired."""
        return all(fault.repaired for fault in self.faults)


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What `gc` removed, or would remove."""

    sets: tuple[SetRecord, ...]
    entries: Mapping[str, tuple[str, ...]]
    """Keys by kind."""
    stored_bytes: int
    put_back: int
    """Entries that a new set named on the second look."""
    leftovers: int


@dataclass(kw_only=True, slots=True)
class Size:
    """How much some entries come to."""

    entries: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0

    def add(self, raw_bytes: int, stored_bytes: int) -> None:
        """Count one more entry."""
        self.entries += 1
        self.raw_bytes += raw_bytes
        self.stored_bytes += stored_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """How big a store is."""

    kinds: Mapping[str, Size]
    sets: Mapping[str, Size]
    """By set key; an entry counts in every set that names it."""
    own: Mapping[str, Size]
    """By set key: what no other set names, so what `gc --drop` of that set alone would free."""
    shared: Size = field(default_factory=Size)
    """Named by two sets or more."""
    orphans: Size = field(default_factory=Size)
    """Named by no set."""
    damaged: int = 0
    leftovers: int = 0


def verify(store: Store, *, full: bool = True, repair: bool = False, progress: Progress | None = None) -> Verified:
    """Check every set and entry -> Verified. `repair` takes what is damaged out of sight.

    Quick: metadata, name = hash of key, size of the chunk. Full: also decode, crc32c, sha256, finite values.
    """
    names = [(kind, key) for kind in ("sets", *KINDS) for key in sorted(_names(store, kind))]
    faults: list[Fault] = []
    for done, ((kind, key), reason) in enumerate(_examine_all(store, names, full), start=1):
        if reason is not None and store.examine(kind, key, full=full) is not None:  # `gc` had it out of sight, or so
            repaired = repair and store.withdraw(kind, key)
            if repaired or not repair:
                faults.append(Fault(kind=kind, key=key, reason=reason, repaired=repaired))
        if progress is not None:
            progress(done, len(names))
    unreadable = {fault.key for fault in faults if fault.kind == "sets"}
    return Verified(
        checked=len(names),
        faults=tuple(faults),
        missing=_missing(store, unreadable),
        leftovers=sum(1 for _ in store.nodes.leftovers(everywhere=True)),
    )


def mend(
    store: Store, wanted: Mapping[str, Collection[str]], *, full: bool = False, progress: Progress | None = None
) -> list[Fault]:
    """Check those of these entries that are there, and take what is damaged out of sight -> those.

    A copy of a store that was interrupted leaves entries cut short. In a bucket, where an object comes whole or not at
    all, nothing is looked at: it would take two requests an entry, or all of its bytes.
    """
    if not isinstance(store.nodes, Folder):
        return []
    names = [(kind, key) for kind, keys in wanted.items() for key in keys]
    faults = []
    for done, ((kind, key), reason) in enumerate(_examine_all(store, names, full), start=1):
        if reason is not None and store.withdraw(kind, key):
            faults.append(Fault(kind=kind, key=key, reason=reason, repaired=True))
        if progress is not None:
            progress(done, len(names))
    return faults


def gc(
    store: Store,
    *,
    now: float,
    dry_run: bool = False,
    keep: int | None = None,
    drop: Collection[str] = (),
    progress: Progress | None = None,
) -> Collected:
    """Delete the entries that no set mentions, and old children of tmp -> Collected.

    Sets go only when asked for: all that are called as in `drop` (or the one whose key begins so), and with
    `keep` all but the newest `keep` of each name. `now`: seconds since 1970. `dry_run` touches nothing.
    """
    doomed = _doomed_sets(store.sets(), keep, drop)  # refuses a damaged set: what it pins cannot be known
    if not dry_run:
        doomed = [record for record in doomed if _drop(store, record)]
    pins = _Pins(store, without={record.key for record in doomed} if dry_run else set())
    garbage = [(kind, key) for kind in KINDS for key in sorted(_names(store, kind) - pins.look())]
    collected: dict[str, list[str]] = {kind: [] for kind in KINDS}
    stored_bytes = put_back = 0
    for done, (kind, key) in enumerate(garbage, start=1):
        size = store.stored_bytes(kind, key)
        if dry_run or _collect(store, kind, key, pins):
            collected[kind].append(key)
            stored_bytes += size
        else:
            put_back += 1
        if progress is not None:
            progress(done, len(garbage))
    return Collected(
        sets=tuple(doomed),
        entries={kind: tuple(keys) for kind, keys in collected.items()},
        stored_bytes=stored_bytes,
        put_back=put_back,
        leftovers=sweep(store, now=now, dry_run=dry_run, everywhere=True),
    )


def sweep(store: Store, *, now: float, dry_run: bool = False, everywhere: bool = False) -> int:
    """Delete what dead writers left more than a day ago -> how many. Encoding begins with it, too.

    `everywhere`: in a bucket as well, where finding it takes a list of all objects.
    """
    old = [left for left in store.nodes.leftovers(everywhere) if now - left.changed > _LEFTOVER_SECONDS]
    if not dry_run:
        pins = _Pins(store, without=())
        for left in old:
            if left.node is None or not _rescued(store, *left.node, pins):
                left.delete()
    return len(old)


def stats(store: Store, progress: Progress | None = None) -> Stats:
    """Add up what is in a store; reads one small file an entry -> Stats."""
    records = store.sets()
    namers: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for kind, keys in needs(record.body).items():
            for key in keys:
                namers.setdefault((kind, key), []).append(record.key)
    kinds = {kind: Size() for kind in KINDS}
    by_set, own = {r.key: Size() for r in records}, {r.key: Size() for r in records}
    shared, orphans, damaged = Size(), Size(), 0
    names = [(kind, key) for kind in KINDS for key in _names(store, kind)]
    for done, (kind, key) in enumerate(names, start=1):
        if progress is not None:
            progress(done, len(names))
        try:
            header = store.header(kind, key)
        except StoreError:
            damaged += store.examine(kind, key, full=False) is not None  # else `gc` has collected it
            continue
        size = (header.raw_bytes, int(header.attributes["stored_bytes"]))
        of = namers.get((kind, key), [])
        kinds[kind].add(*size)
        for name in of:
            by_set[name].add(*size)
        (orphans if not of else own[of[0]] if len(of) == 1 else shared).add(*size)
    return Stats(
        kinds=kinds,
        sets=by_set,
        own=own,
        shared=shared,
        orphans=orphans,
        damaged=damaged,
        leftovers=sum(1 for _ in store.nodes.leftovers(everywhere=True)),
    )


class _Pins:
    """What the sets mention, kept up to date by looking only at sets not seen before: a set never changes.

    A set that lies in tmp counts, too: another `gc` may be about to put it back, or it was damaged and is to be
    made anew.
    """

    def __init__(self, store: Store, without: Collection[str]) -> None:
        self._store = store
        self._seen = set(without)
        self._keys: set[str] = set()

    def look(self) -> set[str]:
        for left in self._store.nodes.leftovers(everywhere=False):
            kind, _, aside = left.node or ("", "", Path())
            if kind == "sets" and aside.name not in self._seen:
                with suppress(OSError):
                    self._keys |= pinned((aside / "zarr.json").read_bytes())
                    self._seen.add(aside.name)
        for key in _names(self._store, "sets") - self._seen:
            try:
                self._keys |= pinned(self._store.nodes.read("sets", key, ("zarr.json",))["zarr.json"])
            except (FileNotFoundError, Damage):
                continue  # dropped since the scan, or a link to nothing; should it come back, it will be looked at
            self._seen.add(key)
        return self._keys


def _collect(store: Store, kind: str, key: str, pins: _Pins) -> bool:
    """Remove one entry, unless a set has come to need it -> is it gone?"""
    aside = store.set_aside(kind, key)
    if aside is None:
        return True
    try:
        needed = key in pins.look()  # the second look: without it, a set published meanwhile would stay incomplete
    except BaseException:
        store.put_back(aside, kind, key)
        raise
    if needed:
        store.put_back(aside, kind, key)
        return False
    durable.discard(aside)
    return True


def _drop(store: Store, record: SetRecord) -> bool:
    """Remove a set, unless it was published anew since it was chosen -> is it gone?"""
    aside = store.set_aside("sets", record.key)
    if aside is None:
        return True
    with suppress(OSError, Damage):
        if parse_set((aside / "zarr.json").read_bytes(), record.key).at != record.at:
            store.put_back(aside, "sets", record.key)
            return False
    durable.discard(aside)
    return True


def _rescued(store: Store, kind: str, key: str, aside: Path, pins: _Pins) -> bool:
    """Put back an entry that a `gc` took out of sight and did not live to put back itself -> was it one?"""
    if kind not in KINDS or key not in pins.look() or not is_whole(aside, kind, key):
        return False
    with suppress(OSError):  # another `gc` had the same thought
        store.nodes.put_back(aside, kind, key)
    return True


def _doomed_sets(records: list[SetRecord], keep: int | None, drop: Collection[str]) -> list[SetRecord]:
    doomed: dict[str, SetRecord] = {}
    for name in drop:
        called = [r for r in records if r.name == name] or [r for r in records if r.key.startswith(name)]
        if not called or (len(called) > 1 and called[0].name != name):
            known = ", ".join(sorted({r.name for r in records})) or "none"
            raise StoreError(f"no set is called {name!r}, nor does just one key begin so. Sets here: {known}.")
        doomed |= {r.key: r for r in called}
    if keep is not None:
        for name in {r.name for r in records}:
            doomed |= {r.key: r for r in [r for r in records if r.name == name][keep:]}
    return list(doomed.values())


def _examine_all(
    store: Store, names: list[tuple[str, str]], full: bool
) -> Iterator[tuple[tuple[str, str], str | None]]:
    local = isinstance(store.nodes, Folder)
    if not full and local:  # a few calls of the system each: threads would take twice as long
        yield from ((name, store.examine(*name, full=False)) for name in names)
        return
    threads = min(_THREADS, os.cpu_count() or 1) if local else _THREADS  # more than cores are a fifth slower
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            yield from zip(batch, pool.map(lambda name: store.examine(*name, full=full), batch), strict=True)


def _missing(store: Store, unreadable: Collection[str]) -> dict[str, int]:
    there = {kind: _names(store, kind) for kind in KINDS}
    counts: dict[str, int] = {}
    for key in _names(store, "sets") - set(unreadable):
        record = store.read_set(key)
        wanted = needs(record.body) if record else {}  # dropped since it was listed
        counts[key] = sum(len(set(keys) - there[kind]) for kind, keys in wanted.items())
    return {key: count for key, count in counts.items() if count}


def _names(store: Store, kind: str) -> set[str]:
    return store.set_keys() if kind == "sets" else store.keys(kind)
