"""What the commands of `relay cache` do: one call into the store each, the answer as text or as JSON."""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import click

from flux2_relay import cache
from flux2_relay.cache import Store, audit, transfer
from flux2_relay.cache.audit import Progress, Size
from flux2_relay.cache.errors import StoreError
from flux2_relay.cache.sets import SetRecord, needs
from flux2_relay.cache.store import KINDS
from flux2_relay.pipeline.place import Where

SHORT = 12
"""Digits of a key that are printed; they are enough for `show`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetRow:
    """A set in a line."""

    key: str
    name: str
    at: str
    entries: int
    missing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryRow:
    """An entry in a line."""

    kind: str
    key: str
    shape: tuple[int, ...] = ()
    dtype: str = "damaged"
    stored_bytes: int = 0
    sets: tuple[str, ...]
    """The keys of those that name it."""
    of: str = ""
    """Caption or picture, in a few words."""


def ls(where: Where, kind: str | None, as_json: bool) -> None:
    """Every set and entry, a line each."""
    store, _ = where.open()
    records = store.sets()
    sets = [_set_row(store, record) for record in records] if kind in (None, "sets") else []
    entries = list(_entry_rows(store, records, [k for k in KINDS if kind in (None, k)]))
    if as_json:
        print_json({"store": store.name, "sets": list(map(asdict, sets)), "entries": list(map(asdict, entries))})
        return
    if sets:
        rows = [[s.name, s.key[:SHORT], s.at[:19], s.entries, s.missing] for s in sets]
        print_table(["set", "key", "published", "entries", "missing"], rows)
    if entries:
        rows = [
            [
                e.kind,
                e.key[:SHORT],
                "x".join(map(str, e.shape)),
                e.dtype,
                in_bytes(e.stored_bytes),
                len(e.sets),
                cut(e.of),
            ]
            for e in entries
        ]
        print_table(["kind", "key", "shape", "type", "stored", "in sets", "of"], rows, may_cut=True)
    if not sets and not entries:
        click.echo(f"{store.name} holds nothing of that kind")


def stats(where: Where, as_json: bool) -> None:
    """How big a store is."""
    store, _ = where.open()
    with progress_bar("reading") as progress:
        found = audit.stats(store, progress)
    if as_json:
        print_json({"store": store.name, **asdict(found)})
        return
    print_table(["kind", "entries", "raw", "stored", "ratio"], [[kind, *_size(s)] for kind, s in found.kinds.items()])
    records = store.sets()
    if records:
        rows = [
            [r.name, r.key[:SHORT], *_size(found.sets[r.key])[:3], in_bytes(found.own[r.key].stored_bytes)]
            for r in records
            if r.key in found.sets
        ]
        print_table(["set", "key", "entries", "raw", "stored", "its own"], rows)
    click.echo(f"shared by several sets: {_in_words(found.shared)}")
    click.echo(f"in no set: {_in_words(found.orphans)}" + ("; `relay cache gc` frees it" * bool(found.orphans.entries)))
    click.echo(f"damaged: {found.damaged}; in tmp: {_in_tmp(found.leftovers)}")


def verify(where: Where, quick: bool, repair: bool, as_json: bool) -> bool:
    """Check a store -> is nothing damaged, or all of it repaired?"""
    store, _ = where.open("a" if repair else "r")
    with progress_bar("verifying") as progress:
        found = audit.verify(store, full=not quick, repair=repair, progress=progress)
    if as_json:
        print_json({"store": store.name, "sound": found.sound, **asdict(found)})
        return found.sound
    for fault in found.faults:
        done = "; taken out of sight" if fault.repaired else ""
        click.echo(f"{store.name}/{fault.kind}/{fault.key} is damaged: {fault.reason}{done}")
    for key, count in found.missing.items():
        click.echo(f"set {key[:SHORT]} lacks {count} entries; `relay encode` with its config makes them")
    repaired = sum(fault.repaired for fault in found.faults)
    click.echo(
        f"{store.name}: {found.checked} entries and sets checked, {len(found.faults)} damaged, {repaired} repaired"
        + (f"; in tmp: {_in_tmp(found.leftovers)}" * bool(found.leftovers))
    )
    if not found.sound:
        click.echo("run `relay cache verify --repair`, then `relay encode`", err=True)
    return found.sound


def gc(where: Where, options: tuple[bool, int | None, Sequence[str]], as_json: bool) -> None:
    """Collect garbage; `options` are dry_run, keep and drop."""
    dry_run, keep, drop = options
    store, _ = where.open("r" if dry_run else "a")
    with progress_bar("collecting") as progress:
        found = audit.gc(store, now=time.time(), dry_run=dry_run, keep=keep, drop=drop, progress=progress)
    if as_json:
        sets = [{"key": record.key, "name": record.name, "at": record.at} for record in found.sets]
        rest = {name: getattr(found, name) for name in ("stored_bytes", "put_back", "leftovers")}
        print_json({"store": store.name, "dry_run": dry_run, "sets": sets, "entries": found.entries, **rest})
        return
    for record in found.sets:
        click.echo(f"set {record.name} {record.key[:SHORT]} of {record.at[:19]}")
    counts = ", ".join(f"{len(keys)} of {kind}" for kind, keys in found.entries.items() if keys) or "no entries"
    verb = "would delete" if dry_run else "deleted"
    click.echo(
        f"{store.name}: {verb} {len(found.sets)} sets, {counts} ({in_bytes(found.stored_bytes)}), "
        f"{found.leftovers} left by dead writers" + (f"; {found.put_back} put back" * bool(found.put_back))
    )


def push(where: Where, other: str, as_json: bool) -> bool:
    """Copy to another store -> was nothing damaged?"""
    store, _ = where.open()
    return _transfer(store, cache.open(other, "a"), as_json)


def pull(where: Where, other: str, as_json: bool) -> bool:
    """Copy from another store -> was nothing damaged?"""
    source = cache.open(other)
    store, _ = where.open("a")
    return _transfer(source, store, as_json)


def _transfer(source: Store, target: Store, as_json: bool) -> bool:
    with progress_bar("copying") as progress:
        found = transfer.copy(source, target, progress)
    if as_json:
        print_json({"from": source.name, "to": target.name, **asdict(found)})
        return not found.faults
    for fault in found.faults:
        click.echo(f"{source.name}/{fault.kind}/{fault.key} is damaged, so it was not copied: {fault.reason}")
    click.echo(
        f"{source.name} -> {target.name}: {found.sets} sets and {found.entries} entries "
        f"({in_bytes(found.stored_bytes)}) copied, {found.present} were there"
    )
    return not found.faults


def _set_row(store: Store, record: SetRecord) -> SetRow:
    return SetRow(
        key=record.key,
        name=record.name,
        at=record.at,
        entries=sum(map(len, needs(record.body).values())),
        missing=sum(map(len, store.missing(record, patient=False).values())),
    )


def _entry_rows(store: Store, records: Sequence[SetRecord], kinds: Sequence[str]) -> Iterator[EntryRow]:
    named_by: dict[str, tuple[str, ...]] = {}
    for record in records:
        for key in {key for keys in needs(record.body).values() for key in keys}:
            named_by[key] = (*named_by.get(key, ()), record.key)
    pictures = picture_names(records)
    names = [(kind, key) for kind in kinds for key in sorted(store.keys(kind))]
    with progress_bar("reading") as progress:
        for done, (kind, key) in enumerate(names, start=1):
            progress(done, len(names))
            sets = named_by.get(key, ())
            try:
                header = store.header(kind, key)
            except StoreError:
                if store.examine(kind, key, full=False) is not None:  # else `gc` has collected it
                    yield EntryRow(kind=kind, key=key, sets=sets)
                continue
            yield EntryRow(
                kind=kind,
                key=key,
                shape=header.shape,
                dtype=header.dtype,
                stored_bytes=header.attributes["stored_bytes"],
                sets=sets,
                of=pictures.get(key) or subject(header.attributes["key"]),
            )


def picture_names(records: Sequence[SetRecord]) -> dict[str, str]:
    """Which sample the latents under a key belong to, as far as sets say so."""
    samples = [sample for record in records for sample in record.body.get("samples", ())]
    return {
        latents["key"]: str(sample["id"])
        for sample in samples
        for latents in sample.get("latents", ())
        if "id" in sample
    }


def subject(key_object: Mapping[str, object]) -> str:
    """What an entry is of, in a few words."""
    if key_object.get("kind") == "text":
        caption = key_object.get("caption")
        return f"shared {key_object.get('rows')} rows" if caption is None else repr(caption)
    return f"image file {str(key_object.get('source'))[:SHORT]}"


def differences(lines: Sequence[str]) -> list[str]:
    """Lines of `explain`, indented below the sentence that they belong to."""
    return [f"    {line}" for line in lines]


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal; it goes when it is done."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="entry", dynamic_ncols=True, leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def print_json(value: Mapping[str, object]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], may_cut: bool = False) -> None:
    """Columns as wide as they must be; numbers to the right.

    `may_cut` shortens the last column to the terminal's width, where there is a terminal.
    """
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    if may_cut and sys.stdout.isatty():
        before = sum(max(len(row[column]) for row in cells) + 2 for column in range(len(header) - 1))
        room = max(8, shutil.get_terminal_size().columns - before)
        cells = [[*row[:-1], cut(row[-1], room)] for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(isinstance(row[column], int) for row in rows) for column in range(len(header))]
    for row in cells:
        padded = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        click.echo("  ".join(padded).rstrip())
    click.echo()


def in_bytes(count: int) -> str:
    """A number of bytes in three digits and a unit."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def cut(text: object, most: int = 60) -> str:
    """A text on one line, its end left out where it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _in_tmp(count: int) -> str:
    return f"{count} (being written, taken out of sight, or left by dead writers)" if count else "nothing"


def _size(size: Size) -> list[object]:
    ratio = size.raw_bytes / size.stored_bytes if size.stored_bytes else 1
    return [size.entries, in_bytes(size.raw_bytes), in_bytes(size.stored_bytes), f"{ratio:.2f}"]


def _in_words(size: Size) -> str:
    return f"{size.entries} entries, {in_bytes(size.stored_bytes)}" if size.entries else "nothing"
