"""The command line of `relay sample`; nothing heavy is imported before it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, Unpack

import click

FILE = click.Path(path_type=Path)


class Asked(TypedDict):
    """The options of `relay sample` as click hands them over."""

    config_file: Path
    settings: tuple[str, ...]
    adapters: tuple[str, ...]
    scales: tuple[str, ...]
    prompts: tuple[str, ...]
    folder: Path
    negative: str | None
    seeds: tuple[int, ...]
    steps: int | None
    guidance: float | None
    size: str | None
    references: tuple[Path, ...]
    as_json: bool


_OPTIONS = (
    click.option("-c", "--config", "config_file", required=True, type=FILE, help="The config whose model and store."),
    click.option("--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Override one key of the config."),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="FILE[=SCALE]",
        help="A LoRA file of any naming, or a run folder, and what multiplies its alpha / rank. Several add up.",
    ),
    click.option(
        "--scale",
        "scales",
        multiple=True,
        metavar="S",
        help="Multiplies the scales of all adapters; 0 is the base. Several: every picture at each.",
    ),
    click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to draw; several are drawn in turn."),
    click.option("-o", "--out", "folder", required=True, type=FILE, metavar="DIR", help="Where the pictures go."),
    click.option("--negative", metavar="TEXT", help="What classifier-free guidance steers away from."),
    click.option("--seed", "seeds", multiple=True, type=click.IntRange(0, 2**32 - 1), help="Of the noise; several."),
    click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; else previews.steps."),
    click.option("--guidance", type=click.FloatRange(min=0), help="Guidance; else previews.guidance."),
    click.option("--size", metavar="WxH", help="Width and height in pixels; else previews.size."),
    click.option("--reference", "references", multiple=True, type=FILE, help="A picture to edit; several."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_with_options
def sample(**asked: Unpack[Asked]) -> None:
    """Draw pictures from the base or with adapters.

    Every prompt is drawn at every seed and scale, with a contact sheet a prompt; each PNG holds its settings. What is
    in DIR already is not drawn again.
    """
    from flux2_relay.pipeline import config, sampling, wish

    loaded = config.load_config(asked["config_file"], asked["settings"])
    sampling.sample(
        loaded,
        wish.Wish(
            folder=asked["folder"].expanduser(),
            prompts=tuple(dict.fromkeys(asked["prompts"])),
            negative=asked["negative"],
            seeds=asked["seeds"],
            steps=asked["steps"],
            guidance=asked["guidance"],
            size=None if asked["size"] is None else wish.parse_size(asked["size"]),
            references=tuple(path.expanduser() for path in asked["references"]),
            adapters=tuple(wish.parse_adapter(text) for text in asked["adapters"]),
            scales=tuple(wish.parse_scale(text) for text in asked["scales"]),
        ),
        asked["as_json"],
    )
