"""The command line: each command checks, calls one function, prints. Nothing heavy is imported before it runs."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.pipeline import adapter_cli, cache_cli, launch, rank, sampling_cli, signals, start_cli

Command = TypeVar("Command", bound=Callable[..., None])


def config_options(command: Command) -> Command:
    """`-c FILE` and any number of `--set key.path=value`; the command gets `config_file` and `settings`."""
    command = click.option(
        "--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Override one key of the config."
    )(command)
    return click.option(
        "-c", "--config", "config_file", required=True, type=click.Path(path_type=Path), help="The config file (YAML)."
    )(command)


def run_options(command: Command) -> Command:
    """`-c`, `--set` and `--sweep` of a command on runs; it gets `config_files`, `settings` and `sweeps`."""
    command = click.option(
        *("--sweep", "sweeps"),
        multiple=True,
        metavar="KEY.PATH=VALUE,VALUE",
        help="A run for each of these values; of several, for each combination.",
    )(command)
    command = click.option(
        "--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Override one key of the config."
    )(command)
    return click.option(
        *("-c", "--config", "config_files"),
        multiple=True,
        required=True,
        type=click.Path(path_type=Path),
        help="The config file (YAML); each of several is a run, or a sweep of its own.",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="flux2-relay")
def cli() -> None:
    """Train LoRAs on FLUX.2 in two stages that meet only in a cache on disk.

    `relay encode` reads captions and pictures into the store, `relay train` trains from the store alone.

    In this order for a first LoRA: init FOLDER, plan, encode, train, decode RUN, report RUN.
    """
    _speak_utf8()


@cli.command()
@run_options
@click.option("--shard", default="1/1", metavar="I/N", help="Of the entries only share I of N, for batch systems.")
def encode(config_files: tuple[Path, ...], settings: tuple[str, ...], sweeps: tuple[str, ...], shard: str) -> None:
    """Stage one: captions and pictures into the store.

    What is there is not encoded again. Any number of these may fill one store at once, on any machines.
    """
    from flux2_relay.pipeline import sweep, together

    together.encode(sweep.expand(config_files, settings, sweeps), shard)


@cli.command()
@run_options
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many steps of this call.")
@click.option(
    "--resume", type=click.Choice(["auto", "never"]), default="auto", help="Go on from the newest checkpoint."
)
@launch.on_hosts
def train(
    config_files: tuple[Path, ...],
    settings: tuple[str, ...],
    sweeps: tuple[str, ...],
    max_steps: int | None,
    resume: str,
) -> None:
    """Stage two: a LoRA from the store, or those of a sweep together.

    While it runs, a file named .save in the run folder asks for a checkpoint, .stop for one and the end.
    """
    from flux2_relay.pipeline import sweep, together

    configs = sweep.expand(config_files, settings, sweeps)
    with rank.taking_part() as group, signals.finish_the_step() as stop:
        together.train(configs, max_steps, resume == "auto", stop, group)


@cli.command()
@run_options
@click.option("--hash", "hash_weights", is_flag=True, help="Hash the text encoder's weights if they are not known yet.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    config_files: tuple[Path, ...],
    settings: tuple[str, ...],
    sweeps: tuple[str, ...],
    hash_weights: bool,
    as_json: bool,
) -> None:
    """What encode and train would do and take; loads no weights."""
    from flux2_relay.pipeline import plan_together, sweep

    plan_together.show(sweep.expand(config_files, settings, sweeps), hash_weights, as_json)


@cli.command()
@config_options
@click.option("--steps", type=click.IntRange(min=1), help="Also train so many steps on trial; 500 is the long form.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(config_file: Path, settings: tuple[str, ...], steps: int | None, as_json: bool) -> None:
    """Test the model against the store; exit status 1 for a no.

    Shapes, loss against its bounds and, with --steps, a training on trial.
    """
    from flux2_relay.pipeline import check, config

    with signals.finish_the_step() as stop:
        if not check.run(config.load_config(config_file, settings), steps or 0, as_json, stop):
            sys.exit(1)


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
def decode(runs: tuple[Path, ...]) -> None:
    """Decode the previews of RUNS to PNG, with a contact sheet each."""
    from flux2_relay.pipeline import commands

    commands.decode(runs)


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The page that compares several: comparison.html beside them.",
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Write RUNS' previews, curves and data as an HTML page each.

    Of several runs also one page that compares them.
    """
    from flux2_relay.pipeline import commands

    commands.report(runs, output)


@cli.command()
@click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="The config whose model.")
@click.option("--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Override a key of it.")
@click.option("--path", metavar="PLACE", help="A model: a folder, a single file, or a repository id.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def models(config_file: Path | None, settings: tuple[str, ...], path: str | None, as_json: bool) -> None:
    """List the known models, or say where the files of one are."""
    from flux2_relay.pipeline import config, models

    if config_file is not None and path is not None:
        raise click.UsageError("Name one model: -c FILE or --path PLACE.")
    if config_file is not None:
        models.of_config(config.load_config(config_file, settings), as_json)
    elif path is not None:
        models.of_path(path, as_json)
    else:
        models.known(as_json)


cli.add_command(cache_cli.cache)
cli.add_command(adapter_cli.export)
cli.add_command(adapter_cli.merge)
cli.add_command(start_cli.init)
cli.add_command(start_cli.import_)
cli.add_command(start_cli.bench)
cli.add_command(sampling_cli.sample)


def main(arguments: list[str] | None = None) -> None:
    """Run a command, that of the process unless `arguments` are given.

    A RelayError is a sentence on stderr and its exit status, without a traceback.
    """
    signals.listen()
    calm_bars()
    try:
        cli.main(arguments, standalone_mode=False)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(InputError.exit_status)
    except RelayError as error:
        _complain(str(error))
        sys.exit(error.exit_status)
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted; everything committed so far is kept, and the same command goes on from there")
        sys.exit(signals.INTERRUPTED)
    except signals.Terminated as leaving:
        _complain("asked to stop; everything committed so far is kept, and the same command goes on from there")
        sys.exit(leaving.exit_status)


def _speak_utf8() -> None:
    """Refuse a locale in which Python garbles names: a picture that is there would be said not to be."""
    names = sys.getfilesystemencoding()
    if names.lower() not in ("utf-8", "utf8"):
        raise InputError(
            f"names and captions are UTF-8 here, but in this locale Python takes them for {names}; "
            "run it with PYTHONUTF8=1, or with a locale such as LC_ALL=C.UTF-8"
        )


def calm_bars() -> None:
    """Let progress bars write now and then, not ten times a second, where a file or a pipe takes them."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # tqdm reads it when it is imported, which is later


def _complain(sentence: str) -> None:
    click.echo(f"relay: {sentence}", err=True)


if __name__ == "__main__":
    main()
