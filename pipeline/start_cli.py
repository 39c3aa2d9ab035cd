"""The commands of somebody who begins: a config for a data set. Nothing heavy is imported before one runs."""

from pathlib import Path

import click

OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Where the config goes.")
FORCE = click.option("--force", is_flag=True, help="Replace the config if it is there.")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@OUTPUT
@click.option("--model", metavar="NAME_OR_PATH", help="A name that `relay models` lists, a folder, file or repository.")
@FORCE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def init(folder: Path, output: Path | None, model: str | None, **how: bool) -> None:
    """Write a commented config for pictures, on this machine.

    Without -o it goes to NAME.yaml here, NAME being the folder's.
    """
    from flux2_relay.pipeline import init

    init.run(folder, output, model, (how["force"], how["as_json"]))


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@OUTPUT
@click.option("--flags", metavar="TEXT_OR_FILE", help="musubi-tuner's flags: as text, in a shell script, or in a TOML.")
@click.option("--model", metavar="NAME_OR_PATH", help="The model, whatever FILE says.")
@FORCE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(file: Path, output: Path | None, flags: str | None, model: str | None, **how: bool) -> None:
    """Turn a config of another trainer into one of ours.

    Reads those of musubi-tuner, ai-toolkit and mflux. Says what was not carried over and why,
    here and at the end of the new config.
    """
    from flux2_relay.pipeline import imported

    imported.run(file, output, flags, model, (how["force"], how["as_json"]))


@click.command()
@click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="Time this config's real weights.")
@click.option("--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Override a key of it.")
@click.option(
    "--model",
    type=click.Choice(["klein-base-4b", "klein-base-9b", "dev"]),
    default="klein-base-4b",
    help="The size of a model with random weights, so that none is needed; without -c.",
)
@click.option(
    "--resolution", type=click.IntRange(16, 8192), metavar="R", help="Pictures of R x R; 512, or the config's."
)
@click.option(
    "--bits", type=click.Choice(["auto", "32", "16", "8", "6", "4"]), default="auto", help="Width of weights."
)
@click.option("--steps", type=click.IntRange(min=1), help="Timed steps, after those that warm up; 5, or 2 if long.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(config_file: Path | None, settings: tuple[str, ...], **asked: object) -> None:
    """Time training steps on this machine, and print one line to share.

    How long it will take is said first: minutes. Of a model too large for this machine's memory, or too slow on it,
    a few blocks are timed; the line says then what it was computed from. Ctrl-C ends it with what was timed so far.
    """
    from flux2_relay.pipeline import bench, config

    loaded = config.load_config(config_file, settings) if config_file is not None else None
    bench.run(bench.Asked(**asked), loaded)  # pyright: ignore[reportArgumentType]
