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
def init(folder: Path, output: Path | None, model: str | None, force: bool) -> None:
    """Write a commented config for the pictures in FOLDER on this machine.

    Without -o it goes to NAME.yaml here, NAME being the folder's.
    """
    from flux2_relay.pipeline import init

    init.run(folder, output, model, force)
