"""`relay init`, the data set: how it must be read, how large its pictures are, and which word may be its trigger."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode import images
from flux2_relay.stages.encode.captions import PLACEHOLDER
from flux2_relay.stages.encode.companions import is_image, labels, walk
from flux2_relay.stages.encode.dataset import DataOptions, Sample, read_samples
from flux2_relay.stages.encode.images import Header, Size

_REPEATED = re.compile(r"(\d{1,3})_(.+)")
"""Folder names that tell how often their pictures are seen, as kohya's scripts read them: `10_ohwx fox`."""
_NEARLY = 0.8
_USUAL = frozenset(
    re.findall(
        r"[\w-]+",
        "a an the this that there here in on at with of two three four several many some no one his her its their my "
        "photo photos photograph picture image portrait selfie painting drawing illustration sketch render screenshot "
        "close-up closeup close full front side back man woman girl boy person people he she it black white red blue",
    )
)
"""Words that captions begin with without meaning anything by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a data set is like."""

    options: DataOptions
    """How it must be read: trigger, repeats and masks filled in, resolutions not yet."""
    samples: tuple[Sample, ...]
    headers: tuple[Header, ...]
    """One a sample."""
    trigger_why: str
    repeats_why: str
    several_lines: int
    """Captions of more than one line."""

    @property
    def transparent(self) -> int:
        """Pictures with transparent pixels."""
        return sum(header.transparent for header in self.headers)

    def buckets(self, resolution: int) -> Counter[Size]:
        """(width, height) -> pictures, at one resolution."""
        return Counter(images.choose_bucket(h.width, h.height, resolution, False) for h in self.headers)

    def filling(self, resolution: int) -> float:
        """The share of pictures with nearly as many pixels as this resolution asks for."""
        return sum(h.width * h.height >= _NEARLY * resolution**2 for h in self.headers) / len(self.headers)

    def small(self, resolution: int) -> int:
        """Pictures that get a smaller bucket than their shape would have at this resolution."""
        sizes = [(h.width, h.height, resolution) for h in self.headers]
        return sum(images.choose_bucket(*s, False) != images.choose_bucket(*s, True) for s in sizes)


def look(folder: Path) -> Found:
    """Read a folder (or .jsonl list) of pictures; InputError names all that `encode` would refuse."""
    first = DataOptions(path=str(folder), masks=str(folder) if _has_labels(folder) else None)
    named = _REPEATED.fullmatch(folder.absolute().name)
    repeats, title = (int(named[1]), named[2]) if named else (1, folder.absolute().stem)
    samples, is_placeholder = _read(first)
    if is_placeholder:
        trigger = _word(title)
        why = f"captions say {PLACEHOLDER}; this word, from the folder's name, takes its place: choose your own"
    else:
        trigger = _shared_start([caption for sample in samples for caption in sample.captions])
        why = "every caption begins with this word, so it seems to be the name of what is learned"
        if trigger is None and named:
            trigger, why = _word(title), "from the folder's name; put in front of captions that lack it"
    options = replace(first, trigger=trigger, repeats=max(1, repeats))
    samples = read_samples([options])
    return Found(
        options=options,
        samples=samples,
        headers=_headers(samples),
        trigger_why=why if trigger else "",
        repeats_why="from the number in front of the folder's name" if repeats > 1 else "",
        several_lines=sum("\n" in caption for sample in samples for caption in sample.captions),
    )


def _has_labels(folder: Path) -> bool:
    """Whether masks lie beside the pictures."""
    try:
        names = [path.relative_to(folder).as_posix() for path in walk(folder) if is_image(path)]
    except OSError:
        return False  # read_samples says it better
    return bool(labels(names))


def _read(options: DataOptions) -> tuple[tuple[Sample, ...], bool]:
    """The samples, and whether their captions leave a place for a trigger word."""
    try:
        return read_samples([options]), False
    except InputError as plain:
        try:
            return read_samples([replace(options, trigger=PLACEHOLDER)]), True
        except InputError:
            raise plain from None


def _headers(samples: Sequence[Sample]) -> tuple[Header, ...]:
    found, faults = [], []
    for sample in samples:
        try:
            found.append(images.read_header(sample.image))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return tuple(found)


def _shared_start(captions: Sequence[str]) -> str | None:
    """The word that all captions begin with, where it is no usual one."""
    words = {caption.split(maxsplit=1)[0].strip(",.:;") if caption.strip() else "" for caption in captions}
    if len(captions) < 3 or len(words) != 1:
        return None
    (word,) = words
    return word if word and word.lower() not in _USUAL else None


def _word(title: str) -> str:
    """A folder's name as one word that can stand in a caption."""
    return "".join(character for character in title.split()[0] if character.isalnum() or character in "-_") or "ohwx"
