"""The commands that write adapters, and models with them, for other programs; what they need is imported in them."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from flux2_relay.pipeline.export import Choice

FILE = click.Path(path_type=Path)


def choice_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which adapter of a run, and how it is written; the command gets them as its first argument."""

    @wraps(command)
    def with_choice(
        step: int | None, best: bool, ema: bool, dtype: str | None, allow_identity: bool, **rest: object
    ) -> None:
        from flux2_relay.pipeline.export import Choice

        if best and step is not None:
            raise click.UsageError("Choose one checkpoint: --best or --step N.")
        command(Choice(step=step, best=best, ema=ema, dtype=dtype, allow_identity=allow_identity), **rest)

    options = (
        click.option("--dtype", type=click.Choice(["bf16", "fp16", "float32"]), help="Of A and B; else the source's."),
        click.option("--step", type=click.IntRange(min=0), help="The run's checkpoint of this step; else the newest."),
        click.option("--best", is_flag=True, help="The run's checkpoint with the least held-out loss."),
        click.option("--ema", is_flag=True, help="The running mean that train.ema asked for."),
        click.option("--allow-identity", is_flag=True, help="Write an adapter that changes nothing, too."),
    )
    for option in reversed(options):
        with_choice = option(with_choice)
    return with_choice


@click.command()
@click.argument("source", metavar="RUN_OR_FILE", type=FILE)
@click.option("--format", "form", required=True, type=click.Choice(["diffusers", "comfyui", "kohya"]), help="For whom.")
@click.option("-o", "--out", required=True, type=FILE, help="The file to write (.safetensors).")
@choice_options
@click.option("-c", "--config", "config_file", type=FILE, help="The config with the model that a FILE is for.")
def export(choice: "Choice", source: Path, form: str, out: Path, config_file: Path | None) -> None:
    """Write an adapter for another program, read back and compared.

    RUN_OR_FILE is a run folder, or a LoRA file of any known naming: so files are converted.
    """
    from flux2_relay.pipeline import config, export

    export.export(source, form, out, choice, None if config_file is None else config.load_config(config_file))


@click.command()
@click.option("-c", "--config", "config_file", required=True, type=FILE, help="The config whose model.")
@click.option("--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Override one key of the config.")
@click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    metavar="FILE[=SCALE]",
    help="A LoRA file or a run; several.",
)
@click.option("-o", "--out", required=True, type=FILE, metavar="DIR", help="The folder to make.")
@click.option("--dtype", type=click.Choice(["bf16", "float32"]), default="bf16", help="Of the transformer's weights.")
@click.option("--link", is_flag=True, help="Link the model's other parts instead of copying them.")
def merge(
    config_file: Path, settings: tuple[str, ...], adapters: tuple[str, ...], out: Path, dtype: str, link: bool
) -> None:
    """Merge adapters into a model: a folder as diffusers has it.

    SCALE multiplies the adapter's own alpha / rank; several adapters add up.
    """
    from flux2_relay.pipeline import config, merge
    from flux2_relay.pipeline.wish import parse_adapter

    merge.merge(config.load_config(config_file, settings), list(map(parse_adapter, adapters)), out, dtype, link)
