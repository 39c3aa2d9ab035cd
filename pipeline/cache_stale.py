"""Why an entry is stale: what a config wants, against what the store has.

All keys are worked out as `relay encode` would, so weights that this machine has not seen are hashed; no model is
loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import click

from flux2_relay.cache import Store, explain
from flux2_relay.cache.errors import InputError
from flux2_relay.cache.sets import needs
from flux2_relay.pipeline import cache_commands as common
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.place import Where

_EXAMPLES = 5  # entries named below a reason that many share


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One entry that a config needs."""

    kind: str
    key_object: Mapping[str, object]
    of: str
    """What it is of, in a few words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stale:
    """An entry that a config needs and the store lacks."""

    kind: str
    key: str
    of: str
    nearest: str | None
    """The key of the entry of the same caption or picture that differs least; None if there is none."""
    differs: list[str]
    """In what, a line for each part of the key."""


def ls_stale(where: Where, kind: str | None, as_json: bool) -> None:
    """What a config lacks, grouped by why."""
    store, config = where.open()
    if config is None:
        raise InputError("--stale compares the store with a config: give it with -c FILE")
    found = [stale for stale in find_stale(store, wanted_by(store, config)) if kind in (None, stale.kind)]
    if as_json:
        common.print_json({"store": store.name, "stale": [asdict(stale) for stale in found]})
        return
    if not found:
        click.echo(f"nothing is stale: {store.name} holds every entry that this config needs")
    reasons: dict[tuple[str, ...], list[Stale]] = {}
    for stale in found:
        reasons.setdefault((stale.kind, *stale.differs), []).append(stale)
    for (of_kind, *differs), group in reasons.items():
        near = "the nearest entry differs in" if differs else "nothing of the same caption or picture is in the store"
        click.echo(f"{len(group)} of {of_kind} missing; {near}")
        for line in common.differences(differs):
            click.echo(line)
        for stale in group[:_EXAMPLES]:
            there = f"  (nearest: {stale.nearest[: common.SHORT]})" if stale.nearest else ""
            click.echo(f"  {stale.key[: common.SHORT]}  {common.cut(stale.of)}{there}")
        if len(group) > _EXAMPLES:
            click.echo(f"  … and {len(group) - _EXAMPLES} more (--json names all)")


def show(where: Where, prefix: str, as_json: bool) -> None:
    """One entry or set in words."""
    store, config = where.open()
    kind, key = store.resolve(prefix)
    if kind == "sets":
        _show_set(store, key, as_json)
        return
    header = store.header(kind, key)
    told = header.attributes
    naming = [r.key for r in store.sets() if key in needs(r.body).get(kind, ())]
    facts = {
        "kind": kind, "key": key, "shape": list(header.shape), "dtype": header.dtype, "raw_bytes": header.raw_bytes,
        "stored_bytes": told["stored_bytes"], "sha256": told["sha256"], "sets": naming,
    }  # fmt: skip
    needed, differs = (None, []) if config is None else is_needed(wanted_by(store, config), key, told["key"])
    if as_json:
        verdict = {} if needed is None else {"needed": needed, "differs": differs}
        common.print_json({**facts, "key_object": told["key"], "made": told["made"], **verdict})
        return
    click.echo(f"{store.name}/{kind}/{key}")
    size = f"{common.in_bytes(header.raw_bytes)}, {common.in_bytes(told['stored_bytes'])} stored"
    _print_all("", [f"array: {'x'.join(map(str, header.shape))} {header.dtype}, {size}"])
    _print_all("depends on", explain.in_words(told["key"]))
    _print_all("made", [f"{name}: {value}" for name, value in told["made"].items()])
    _print_all("named by sets", [name[: common.SHORT] for name in naming] or ["none; `relay cache gc` would delete it"])
    if needed:
        click.echo("this config needs it")
    elif needed is not None:
        click.echo("this config does not need it" + ("; what it needs instead differs in" if differs else ""))
        _print_all("", differs)


def wanted_by(store: Store, config: Config) -> dict[str, Wanted]:
    """Every entry that a config needs, by key."""
    from flux2_relay.pipeline.commands import encode_job
    from flux2_relay.stages.encode import stage

    need = stage.needed(encode_job(config, lambda: store))
    found = {
        key: Wanted(kind="text", key_object=key_object, of=common.subject(key_object))
        for key, key_object in need.text.items()
    }
    for key, want in need.latents.items():
        found[key] = Wanted(kind="latents", key_object=want.key, of=str(want.image))
    for key, want in need.masks.items():
        found[key] = Wanted(kind="masks", key_object=want.key, of=str(want.image))
    return found


def find_stale(store: Store, wanted: Mapping[str, Wanted]) -> Iterator[Stale]:
    """Each wanted entry that is not there, with the nearest one that is."""
    for kind in sorted({want.kind for want in wanted.values()}):
        missing = [key for key in wanted if wanted[key].kind == kind and key not in store.keys(kind)]
        candidates = dict(explain.key_objects(store, kind)) if missing else {}
        for key in missing:
            near = explain.nearest(wanted[key].key_object, candidates)
            nearest, differs = near if near is not None else (None, [])
            yield Stale(kind=kind, key=key, of=wanted[key].of, nearest=nearest, differs=differs)


def is_needed(wanted: Mapping[str, Wanted], key: str, found: Mapping[str, object]) -> tuple[bool, list[str]]:
    """Whether an entry is wanted; if not, in what it differs from the nearest that is."""
    if key in wanted:
        return True, []
    near = explain.nearest(found, {name: want.key_object for name, want in wanted.items()})
    return False, explain.explain(wanted[near[0]].key_object, found) if near is not None else []


def _show_set(store: Store, key: str, as_json: bool) -> None:
    record = store.open_set(key)
    missing, all_needs = store.missing(record), needs(record.body)
    if as_json:
        common.print_json({"kind": "sets", "key": key, "body": record.body, "made": record.made, "missing": missing})
        return
    click.echo(f"{store.name}/sets/{key}")
    identities = [f"{name}: {str(value)[: common.SHORT]}" for name, value in record.body.get("identities", {}).items()]
    counts = [f"{kind}: {len(keys)}, {len(missing.get(kind, ()))} missing" for kind, keys in all_needs.items()]
    _print_all("", [f"name: {record.name}", f"published: {record.at}"])
    _print_all("identities", identities)
    _print_all("entries", counts)
    _print_all("asked for by", [f"{name}: {common.cut(value, 100)}" for name, value in record.body["request"].items()])


def _print_all(title: str, lines: Sequence[str]) -> None:
    if title and lines:
        click.echo(title)
    for line in common.differences(lines):
        click.echo(line)
