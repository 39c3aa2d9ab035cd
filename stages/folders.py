"""Where the parts of a model lie: one folder in the diffusers layout, single files, or each part somewhere else.

A place is a folder or a file. `find` only looks; a part that is not there gets the place where it would be, so that a
training machine needs no text encoder, and whoever reads it says what is missing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import hub, names
from flux2_relay.stages.catalogue import SOURCES, PartName, download, download_all
from flux2_relay.stages.weights import listing, read_header

PARTS: tuple[PartName, ...] = ("transformer", "text_encoder", "tokenizer", "vae")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolders:
    """The place of a model as it was named, and of each of its parts."""

    root: Path
    transformer: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path

    def missing(self) -> tuple[PartName, ...]:
        """The parts of which there are no files where they should be."""
        return tuple(part for part in PARTS if not is_there(part, getattr(self, part)))


def find(
    path: str, text_encoder: str | None = None, tokenizer: str | None = None, vae: str | None = None
) -> ModelFolders:
    """The places that the `model` section of a config names; `~` is expanded.

    Each is a folder, a single file, or the id of a repository in the local Hugging Face cache. Parts that are not named
    are looked for in the model's folder (of a single file: the folder it lies in), as folders or as single files.
    """
    root = _place(path, "path")
    folder = root.parent if root.is_file() else root
    return ModelFolders(
        root=root,
        transformer=root if root.is_file() else _inside(folder, "transformer"),
        text_encoder=_part(text_encoder, "text_encoder") or _inside(folder, "text_encoder"),
        tokenizer=_part(tokenizer, "tokenizer") or folder / "tokenizer",
        vae=_part(vae, "vae") or _inside(folder, "vae"),
    )


def require(places: ModelFolders, parts: Iterable[PartName], model: str | None) -> None:
    """Refuse a model that lacks one of `parts`, naming the files of `model` (a name of the catalogue) to download."""
    faults = [f"{getattr(places, part)}: {download(part, model)}" for part in places.missing() if part in parts]
    if faults:
        raise InputError(listing(f"{places.root} lacks files that are needed here:", faults))


def is_there(part: PartName, place: Path) -> bool:
    """Whether a part's own files stand in its place."""
    if part == "tokenizer":
        return (place / "tokenizer.json").is_file()
    return place.is_file() or any(file.is_file() for file in place.glob("*.safetensors"))


def _part(named: str | None, part: PartName) -> Path | None:
    if named is None:
        return None
    place = _place(named, part)
    if part == "tokenizer" and place.is_file():
        place = place.parent  # tokenizer.json itself
    # Another model's whole folder may be named as well as the part inside it.
    return place / part if (place / part).is_dir() else place


def _place(named: str, key: str) -> Path:
    place = Path(named).expanduser()
    if place.exists():
        return place
    if not hub.is_id(named):
        raise InputError(f"model.{key}: {place} is no folder and no file")
    found = hub.snapshot(named)
    if found is None:
        model = next((name for name, source in SOURCES.items() if source.repository == named), None)
        command = download_all(model) if model else f"hf download {named}"
        raise InputError(
            f"model.{key}: {named} is no folder and no file here, and no repository of that id lies in the Hugging "
            f"Face cache {hub.cache_folder()}; this program downloads nothing: {command}"
        )
    return found


def _inside(folder: Path, part: names.Part) -> Path:
    """Where a part lies in a model's folder: in a folder of its own or, failing that, in a file."""
    usual = folder / part
    if usual.is_dir():
        return usual
    found = [file for file in sorted(folder.glob("*.safetensors")) if part in parts_of(file)]
    if len(found) > 1:
        title = f"{folder}: several files hold a {part.replace('_', ' ')}; name one of them in the config:"
        raise InputError(listing(title, [file.name for file in found]))
    return found[0] if found else usual


def parts_of(file: Path) -> frozenset[names.Part]:
    """Which parts a file holds, told by the names in it; none where it cannot be read."""
    try:
        return names.parts_in(read_header(file))
    except InputError:
        return frozenset()
