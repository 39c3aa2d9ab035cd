"""Where the parts of a model lie: one folder in the diffusers layout, any part of which may be elsewhere."""

from dataclasses import dataclass
from pathlib import Path

from flux2_relay.cache.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolders:
    """The folder of a model and of each of its parts."""

    root: Path
    transformer: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path


def find(
    path: str, text_encoder: str | None = None, tokenizer: str | None = None, vae: str | None = None
) -> ModelFolders:
    """The folders that the `model` section of a config names; `~` is expanded, nothing is read."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"model.path: {root} is no folder; it must be a FLUX.2 checkpoint in the diffusers layout")
    return ModelFolders(
        root=root,
        transformer=root / "transformer",
        text_encoder=_part(text_encoder, "text_encoder", root),
        tokenizer=_part(tokenizer, "tokenizer", root),
        vae=_part(vae, "vae", root),
    )


def _part(named: str | None, name: str, root: Path) -> Path:
    if named is None:
        return root / name
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise InputError(f"model.{name}: {folder} is no folder")
    # Another model's whole folder may be named as well as the part inside it.
    return folder / name if (folder / name).is_dir() else folder
