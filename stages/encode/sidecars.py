"""Captions in files beside their pictures, as other trainers put them there.

`a.txt` or `a.caption` (kohya) beside `a.png`; `a.json` with `caption` and `caption_short` (ai-toolkit); and pairs for
edit training (mflux): `01_in.png`, `01_in.txt`, `01_out.png`, where the text says how the first becomes the second.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from flux2_relay.stages.encode.captions import Mode, read_text

_TEXTS = (".txt", ".TXT", ".caption")
_IN, _OUT = "_in", "_out"


def has_text(image: Path) -> bool:
    """Whether there is a text file beside a picture."""
    return any(image.with_suffix(suffix).is_file() for suffix in _TEXTS)


def texts_beside(image: Path, mode: Mode) -> dict[str, list[str]]:
    """The files beside a picture that hold captions -> their texts; InputError for one that cannot be read.

    JSON is looked for where there is no text file. Of a long and a short caption the long one counts, and both where
    several captions are wanted (`lines`).
    """
    files = {path: None for suffix in _TEXTS if (path := image.with_suffix(suffix)).is_file()}
    if files:
        return {str(path): [read_text(path)] for path in files}
    path = image.with_suffix(".json")
    found = _of_json(read_text(path)) if path.is_file() else []
    return {str(path): found if mode == "lines" else found[:1]} if found else {}


def _of_json(text: str) -> list[str]:
    """The captions of a JSON object, the long one first; none where it is about something else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(values, dict):
        return []
    found = (values.get(key) for key in ("caption", "caption_short"))
    return [caption for caption in found if isinstance(caption, str)]


def edit_pairs(images: Mapping[str, Path], listed: Collection[str]) -> dict[str, str]:
    """Name of a picture -> name of the one it was made from, for pairs whose text stands beside the latter.

    A picture with a caption of its own, or in a listing (`listed`), is an ordinary one whatever its name.
    """
    by_stem = {str(PurePosixPath(name).with_suffix("")): name for name in images}
    pairs = {}
    for stem, name in by_stem.items():
        source = by_stem.get(stem.removesuffix(_OUT) + _IN) if stem.endswith(_OUT) else None
        if source and name not in listed and has_text(images[source]) and not has_text(images[name]):
            pairs[name] = source
    return pairs
