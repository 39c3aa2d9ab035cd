"""The commands of `relay cache`: look into a store and look after it. Nothing heavy is imported before one runs."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import click

from flux2_relay.pipeline.place import Where


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """`-c FILE`, `--set` and `--store PATH`; the command gets them as its first argument."""

    @wraps(command)
    def with_where(config_file: Path | None, settings: tuple[str, ...], store: str | None, **rest: object) -> None:
        if config_file is None and store is None:
            raise click.UsageError("Name the store: -c FILE for the one of a config, or --store PATH.")
        command(Where(config_file, settings, store), **rest)

    options = (
        click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="The config whose store."),
        click.option("--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Override a key of it."),
        click.option("--store", metavar="PATH", help="The store itself: a folder, or s3://, gs://, az://."),
    )
    for option in reversed(options):
        with_where = option(with_where)
    return with_where


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group("cache")
def cache() -> None:
    """Look into the store, and look after it."""


@cache.command()
@store_options
@click.option("--kind", type=click.Choice(["text", "latents", "masks", "sets"]), help="Only these.")
@click.option("--stale", is_flag=True, help="What the config (-c) lacks, and how the nearest entry differs.")
@JSON
def ls(where: Where, kind: str | None, stale: bool, as_json: bool) -> None:
    """List sets and entries."""
    from flux2_relay.pipeline import cache_commands, cache_stale

    if stale:
        cache_stale.ls_stale(where, kind, as_json)
    else:
        cache_commands.ls(where, kind, as_json)


@cache.command()
@click.argument("prefix")
@store_options
@JSON
def show(where: Where, prefix: str, as_json: bool) -> None:
    """Say in words what an entry or a set depends on.

    It is the one whose key begins with PREFIX. With a config (-c) also whether that config needs it,
    and if not, in what it differs.
    """
    from flux2_relay.pipeline import cache_stale

    cache_stale.show(where, prefix, as_json)


@cache.command()
@store_options
@JSON
def stats(where: Where, as_json: bool) -> None:
    """Say how big the store is, and what belongs to which set."""
    from flux2_relay.pipeline import cache_commands

    cache_commands.stats(where, as_json)


@cache.command()
@store_options
@click.option("--quick", is_flag=True, help="Only metadata, names and sizes; decode nothing.")
@click.option("--repair", is_flag=True, help="Take what is damaged out of sight, so that `relay encode` makes it anew.")
@JSON
def verify(where: Where, quick: bool, repair: bool, as_json: bool) -> None:
    """Check every entry and set; exit status 1 for damage.

    Damage that --repair took out of sight counts as none.
    """
    from flux2_relay.pipeline import cache_commands

    _leave(cache_commands.verify(where, quick, repair, as_json))


@cache.command()
@store_options
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="Drop all but the newest N sets of each name.")
@click.option("--drop", multiple=True, metavar="NAME", help="Drop the sets of this name, or the one of this key.")
@JSON
def gc(where: Where, dry_run: bool, keep: int | None, drop: tuple[str, ...], as_json: bool) -> None:
    """Delete the entries that no set names, and what dead writers left.

    Safe while others encode, in a bucket too.
    """
    from flux2_relay.pipeline import cache_commands

    cache_commands.gc(where, (dry_run, keep, drop), as_json)


@cache.command()
@store_options
@click.option("--caption", metavar="TEXT", help="The caption whose context is wanted.")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", help="The picture whose latents are wanted.")
@click.option("--key", metavar="PREFIX", help="The entry by its key, e.g. one of several resolutions.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.safetensors")
@JSON
def export(where: Where, output: Path, as_json: bool, **which: object) -> None:
    """Write one entry whole, in float32.

    The file holds one tensor: `context` [T, C] or `latents` [H/16, W/16, 128].
    """
    from flux2_relay.pipeline import cache_export

    if sum(value is not None for value in which.values()) != 1:
        raise click.UsageError("Give one of --caption TEXT, --image FILE and --key PREFIX.")
    cache_export.export(where, cache_export.Which(**which), output, as_json)  # pyright: ignore[reportArgumentType]


@cache.command()
@click.argument("other", metavar="STORE")
@store_options
@JSON
def push(where: Where, other: str, as_json: bool) -> None:
    """Copy to STORE (a folder or URL) what it lacks.

    It is made if need be.
    """
    from flux2_relay.pipeline import cache_commands

    _leave(cache_commands.push(where, other, as_json))


@cache.command()
@click.argument("other", metavar="STORE")
@store_options
@JSON
def pull(where: Where, other: str, as_json: bool) -> None:
    """Copy what STORE (a folder or URL) has and this store lacks."""
    from flux2_relay.pipeline import cache_commands

    _leave(cache_commands.pull(where, other, as_json))


def _leave(sound: bool) -> None:
    if not sound:
        sys.exit(1)
