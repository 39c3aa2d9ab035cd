"""Latents that stage two left in files, to PNG: previews of a run, and pictures on demand.

Only the VAE's decoder half is loaded.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import identity, names, vae
from flux2_relay.stages.decode.sheet import contact_sheet
from flux2_relay.stages.files import read_tensors
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.one_model import in_turn, say_loaded
from flux2_relay.stages.spec import read_vae_spec

_UNLIMITED = 1 << 60  # bytes


@dataclass(frozen=True, slots=True)
class Preview:
    """One preview: step and prompt number as its file name has them, the prompt, and the picture's place."""

    step: int
    number: int
    latents: Path

    @property
    def picture(self) -> Path:
        """Where the PNG lies."""
        return self.latents.with_suffix(".png")


def previews(folder: Path) -> list[Preview]:
    """The previews of a run folder by step, then prompt."""
    found = []
    for path in sorted((folder / "previews").glob("*.safetensors")):
        step, _, number = path.stem.partition("-")
        if step.isdigit() and number.isdigit():
            found.append(Preview(int(step), int(number), path))
    return found


def decode(
    folder: Path, folders: ModelFolders, say: Callable[[str], None], budget_bytes: int | None = None
) -> list[Path]:
    """Decode what has no picture yet and draw the contact sheet -> the pictures made now.

    Pictures that do not fit into `budget_bytes` whole are decoded in strips.
    The VAE is not loaded where nothing is to do. InputError names latents that cannot be read.
    """
    every = previews(folder)
    if not every:
        raise InputError(f"{folder / 'previews'}: holds no preview latents; set previews.prompts and train")
    todo = [preview for preview in every if not _is_current(preview)]
    to_png([(preview.latents, preview.picture) for preview in todo], folders, say, budget_bytes)
    contact_sheet(every_picture(every), folder / "previews" / "sheet.png")
    return [preview.picture for preview in todo]


def every_picture(every: list[Preview]) -> dict[tuple[int, int], Path]:
    """The pictures by (prompt number, step)."""
    return {(preview.number, preview.step): preview.picture for preview in every}


def _is_current(preview: Preview) -> bool:
    picture = preview.picture
    return picture.exists() and picture.stat().st_mtime_ns >= preview.latents.stat().st_mtime_ns


def to_png(
    todo: Sequence[tuple[Path, Path]], folders: ModelFolders, say: Callable[[str], None], budget_bytes: int | None
) -> None:
    """Decode each file of latents to the PNG beside it, its metadata as text chunks; loads nothing for nothing."""
    if todo:
        work = partial(_decode, todo, folders, say, budget_bytes)
        in_turn("VAE decoder", work, say, _predicted([latents for latents, _ in todo], folders, budget_bytes))


def _predicted(files: Sequence[Path], folders: ModelFolders, budget_bytes: int | None) -> int | None:
    """The peak of decoding the largest; files that cannot be read are told when it is their turn."""
    sizes = []
    for file in files:
        with suppress(RuntimeError, OSError, ValueError, KeyError, TypeError):
            height, width, _ = mx.load(str(file))["latents"].shape  # pyright: ignore[reportCallIssue, reportArgumentType]
            sizes.append((height, width))
    if not sizes:
        return None
    _, peak = vae.decoder_peak(read_vae_spec(folders.vae), max(sizes, key=prod), budget_bytes or _UNLIMITED)
    return peak


def identity_of(folders: ModelFolders) -> str:
    """SHA-256 of the decoder half's weights."""
    spec = read_vae_spec(folders.vae)
    tensors = names.open_vae(folders.vae)
    return identity.weights_identity(tensors, vae.decoder_tensor_names(spec), vae.identity_config(spec))


def _decode(
    todo: Sequence[tuple[Path, Path]], folders: ModelFolders, say: Callable[[str], None], budget_bytes: int | None
) -> None:
    decoder = vae.load_decoder(folders.root, folders.vae)
    say_loaded("VAE decoder (float32)", say)
    for latents, picture in tqdm(todo, desc="decoding", unit="picture", dynamic_ncols=True):
        values, metadata = read_tensors(latents)
        pixels = to_pixels(decoder.decode(values["latents"][None], budget_bytes)[0])
        told = PngInfo()
        for name, value in metadata.items():
            told.add_text(name, value)
        aside = picture.with_suffix(".part")
        Image.fromarray(pixels).save(aside, "PNG", pnginfo=told)
        aside.replace(picture)


def to_pixels(image: mx.array) -> np.ndarray:
    """[H, W, 3] in about [-1, 1] -> uint8, as diffusers rounds it."""
    return np.array(mx.round(255 * mx.clip(image / 2 + 0.5, 0, 1)).astype(mx.uint8))
