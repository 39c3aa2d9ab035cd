"""Pictures that go with a picture: its mask, and the references of edit training, found by their names.

Imports nothing heavy, and opens no picture. A companion has the base name of its picture, at the same place below
its own folder: `data/fox/a.png` and `masks/fox/a.jpg`. Several references of one folder are numbered: `a_0.png`,
`a_1.png`. A mask may also be called `a-masklabel.png`, and then lie beside the picture.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from flux2_relay.stages.encode.captions import composed

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
ALPHA = "alpha"
_LABEL = "-masklabel"


def is_image(file: Path) -> bool:
    """Whether a file's name is that of a picture which can be read."""
    return file.suffix.lower() in IMAGE_TYPES


def walk(folder: Path, skipped: Collection[Path] = (), above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below a folder, sorted, hidden ones skipped; links are followed, never in a circle.

    `skipped` are folders below it, resolved, that hold something else.
    """
    here = folder.resolve()
    if here in above or (above and here in skipped):
        return
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk(folder / entry.name, skipped, (*above, here))
        else:
            yield folder / entry.name


def labels(names: Collection[str]) -> set[str]:
    """Those of these pictures that are masks of another one beside them."""
    stems = {name: _stem(name) for name in names}
    pictures = set(stems.values())
    return {name for name, stem in stems.items() if stem.endswith(_LABEL) and stem.removesuffix(_LABEL) in pictures}


class _Index:
    """The pictures of a folder by their place below it, without suffix; numbered ones by what they are numbers of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.named: dict[str, list[Path]] = {}
        self.numbered: dict[str, dict[int, list[Path]]] = {}
        for path in filter(is_image, walk(folder)):
            stem = _stem(composed(path.relative_to(folder).as_posix()))
            self.named.setdefault(stem, []).append(path)
            if found := re.fullmatch(r"(.+)_(\d+)", stem):
                self.numbered.setdefault(found[1], {}).setdefault(int(found[2]), []).append(path)


class Companions:
    """The masks and references of one entry of `data`; what is wrong with them is told by `finish`."""

    def __init__(self, key: str, masks: str | None, references: Sequence[str]) -> None:
        """`key` is where the entry stands in the config."""
        self.key = key
        self._faults: list[str] = []
        self._masks = None if masks in (None, ALPHA) else self._index("masks", str(masks))
        self._references = [index for name in references if (index := self._index("references", name))]
        self.folders = [index.folder.resolve() for index in (self._masks, *self._references) if index]
        self._asked = self._masked = 0
        self._lacking: dict[Path, list[str]] = {}

    def mask(self, name: str, image: Path) -> Path | None:
        """The mask of the picture `name`, None where it has none."""
        if not self._masks:
            return None
        self._asked += 1
        stem = _stem(name)
        found = self._masks.named.get(stem + _LABEL) or self._masks.named.get(stem, [])
        if image in found:
            return None
        self._masked += bool(found)
        return self._only(found, name)

    def references(self, name: str, image: Path, listed: Sequence[Path]) -> tuple[Path, ...]:
        """The references of a picture: those that a listing gives it, or those of each folder in turn."""
        if listed and self._references:
            self._faults.append(f"{self.key}.references: {name} is given references in a listing, too; keep one way")
        if listed or not self._references:
            return tuple(listed)
        found = []
        for index in self._references:
            of_folder = self._of_folder(index, name)
            if not of_folder or image in of_folder:
                self._lacking.setdefault(index.folder, []).append(name)
            found += of_folder
        return tuple(found)

    def finish(self) -> list[str]:
        """All faults, once every picture has been asked for."""
        if self._masks and self._asked and not self._masked:
            self._faults.append(
                f"{self.key}.masks: {self._masks.folder} has a mask for no picture; a mask has its picture's base name"
            )
        for folder, names in self._lacking.items():
            lines = "".join(f"\n  {name}" for name in names)
            self._faults.append(
                f"{self.key}.references: {folder} has no image of the same base name (or NAME_0, NAME_1) for:{lines}"
            )
        return self._faults

    def _index(self, option: str, name: str) -> _Index | None:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            self._faults.append(f"{self.key}.{option}: {folder} is not a folder; correct the path")
            return None
        try:
            return _Index(folder)
        except OSError as error:
            self._faults.append(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")
            return None

    def _of_folder(self, index: _Index, name: str) -> list[Path]:
        stem = _stem(name)
        numbered = index.numbered.get(stem, {})
        groups = [index.named[stem]] if stem in index.named else [numbered[n] for n in sorted(numbered)]
        return [only for group in groups if (only := self._only(group, name))]

    def _only(self, found: Sequence[Path], name: str) -> Path | None:
        if len(found) > 1:
            listed = " and ".join(path.name for path in found)
            self._faults.append(f"{found[0].parent}: {listed} both go with {name}; keep one")
        return found[0] if found else None


def _stem(name: str) -> str:
    """A path with "/" less its suffix."""
    return str(PurePosixPath(name).with_suffix(""))
