"""What the user gives to train on: folders of pictures and captions, read into samples.

Imports nothing heavy, so that a config can be checked without MLX. No picture is opened here; what is wrong
with names, captions and listings is found for all folders at once, before a model is loaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode.captions import (
    CAPTIONS,
    METADATA,
    PLACEHOLDER,
    TABLE,
    Listing,
    clean,
    composed,
    disagreement,
    is_unicode,
)
from flux2_relay.stages.encode.companions import ALPHA, IMAGE_TYPES, Companions, is_image, labels, walk
from flux2_relay.stages.encode.sidecars import edit_pairs, has_text, texts_beside

_OTHER_TYPES = (
    ".heic",
    ".heif",
    ".jxl",
    ".gif",
    ".psd",
    ".dng",
    ".jp2",
    ".jfif",
)  # worth a word beside a caption


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """One folder (or .jsonl list) of pictures and captions, and how they are used."""

    path: str
    """A folder with images and .txt files, metadata.jsonl or .csv, captions.json; or a .jsonl or .csv file."""

    captions: Literal["whole", "lines"] = "whole"
    """`whole`: a text is one caption, line breaks included; `lines`: a caption a line, one drawn a time."""

    trigger: str | None = None
    """A word that replaces [trigger] in captions and is put in front of those that lack it."""

    repeats: int = field(default=1, metadata={"min": 1})
    """How often each picture is seen in one pass over the data."""

    resolutions: tuple[int, ...] = field(default=(512,), metadata={"min": 16})
    """Area budgets R x R; each picture is encoded once for each of them."""

    upscale: bool = False
    """Enlarge pictures that are smaller than their bucket, instead of giving them a smaller one."""

    crop: Literal["center", "top", "random"] = "center"
    """What is kept of a picture that does not have its bucket's shape; `random` depends on seed and file."""

    flip: bool = False
    """Encode each picture a second time, mirrored."""

    background: str = "white"
    """The colour that transparent pixels are laid on: a name, or #rrggbb."""

    masks: str | None = None
    """A folder of masks (white is trained on), or `alpha`."""

    references: tuple[str, ...] = ()
    """Folders of reference images with the same base names, for edit training."""

    prior: bool = False
    """These are regularisation images, weighted by `train.prior_weight`."""

    def __post_init__(self) -> None:
        """Refuse values that no type excludes."""
        if not self.resolutions or len(set(self.resolutions)) < len(self.resolutions):
            raise InputError(f"'resolutions' must name each resolution once, found {list(self.resolutions)}")
        if self.trigger is not None and (not self.trigger.strip() or self.trigger != self.trigger.strip()):
            raise InputError(f"'trigger' must be a word without outer spaces, or null; found {self.trigger!r}")
        self.background_hex()

    def background_hex(self) -> str:
        """The background as "#rrggbb", however it was written."""
        from PIL import ImageColor  # only here: the command line reads configs without Pillow

        try:
            red, green, blue = ImageColor.getrgb(self.background)[:3]
        except ValueError:
            found = repr(self.background)
            raise InputError(f"'background' must be a colour such as white or #ffffff, found {found}") from None
        return f"#{red:02x}{green:02x}{blue:02x}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One picture to train on, with every caption it may be shown with."""

    id: str
    """Its path below the data folder with "/"; with several folders, the folder's number comes first."""

    image: Path
    captions: tuple[str, ...]
    options: DataOptions

    mask: Path | None = None
    """A picture of the same shape, white where it is trained on; with `masks: alpha` the image is its own."""

    references: tuple[Path, ...] = ()
    """What the model sees besides the caption."""


def read_samples(data: Sequence[DataOptions]) -> tuple[Sample, ...]:
    """Every sample, folder by folder, sorted by name; one InputError says all that is wrong.

    Pictures are not opened, but where something else is wrong: then those that cannot be used are named with it.
    """
    samples: list[Sample] = []
    pictures: list[Path] = []
    faults: list[str] = [] if data else ["data: names no folder; give at least one 'path'"]
    for index, options in enumerate(data):
        folder = _Folder(options, "data" if len(data) == 1 else f"data.{index}")
        prefix = "" if len(data) == 1 else f"{index}/"
        samples += [replace(sample, id=prefix + sample.id) for sample in folder.read()]
        faults += folder.faults + folder.companions.finish()
        pictures += folder.images
    if faults:
        raise InputError("\n".join([*faults, *_unusable(pictures)]))
    return tuple(samples)


def _unusable(pictures: Sequence[Path]) -> Iterator[str]:
    """What is wrong with pictures, from their headers."""
    from flux2_relay.stages.encode import images  # only here: configs are read without Pillow

    for picture in pictures:
        try:
            images.image_size(picture)
        except InputError as error:
            yield str(error)


class _Folder:
    """Reads one entry of `data` and notes every fault on the way."""

    def __init__(self, options: DataOptions, key: str) -> None:
        self.options, self.key = options, key
        self.path = Path(options.path).expanduser()
        self.faults: list[str] = []
        self.images: list[Path] = []
        self.companions = Companions(key, options.masks, options.references)
        self.pairs: dict[str, str] = {}

    def read(self) -> Iterator[Sample]:
        """Each image with its captions, its mask and its references."""
        if self.path.suffix.lower() in (".jsonl", ".csv") and self.path.is_file():
            listing = Listing(self.path.parent)
            (listing.read_table if self.path.suffix.lower() == ".csv" else listing.read_jsonl)(self.path)
            files = {name: listing.root / name for name in sorted(listing.texts)}
            images = {name: file for name, file in files.items() if is_image(file) and file.is_file()}
        elif self.path.is_dir():
            listing = Listing(self.path)
            files = self.walk(listing)
            images = self.pictures(files, listing)
            self.note_types(files)
        else:
            what = "is neither a folder nor a .jsonl or .csv file" if self.path.exists() else "does not exist"
            self.faults.append(f"{self.key}.path: {self.path} {what}; correct the path")
            return
        self.faults += listing.faults
        self.faults += listing.check_names(images, IMAGE_TYPES)
        if not images and not self.faults:
            types = ", ".join(suffix[1:] for suffix in IMAGE_TYPES)
            self.faults.append(f"{self.key}.path: {self.path} holds no images; put some there ({types})")
        yield from self.samples(images, listing)

    def pictures(self, files: dict[str, Path], listing: Listing) -> dict[str, Path]:
        """The images to train on: not those that a listing calls references, not masks beside their pictures."""
        images = {name: file for name, file in files.items() if is_image(file)}
        masks = labels(images)
        if masks and self.options.masks in (None, ALPHA):
            self.faults.append(f"{self.key}.masks: name the folder of these masks here:{_lines(sorted(masks))}")
        self.pairs = edit_pairs(images, listing.texts)
        others = masks | {*self.pairs.values()} | {name for names in listing.references.values() for name in names}
        return {name: file for name, file in images.items() if name not in others}

    def walk(self, listing: Listing) -> dict[str, Path]:
        """Every visible file by name, sorted; listings met on the way are read."""
        files = {}
        try:
            for file in walk(self.path, self.companions.folders):
                files[composed(file.relative_to(self.path).as_posix())] = file
        except OSError as error:
            self.faults.append(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")
        for file in files.values():
            if file.name == METADATA:
                listing.read_jsonl(file)
            elif file.name == TABLE:
                listing.read_table(file)
            elif file.name == CAPTIONS:
                listing.read_captions(file)
        return dict(sorted(files.items()))

    def note_types(self, files: dict[str, Path]) -> None:
        """Pictures of a type that is not read, where a caption shows that they are meant to be."""
        for name, file in files.items():
            if file.suffix.lower() in _OTHER_TYPES and has_text(file):
                self.faults.append(f"{self.path}: {name} is of a type that is not read; convert it to PNG")

    def samples(self, images: dict[str, Path], listing: Listing) -> Iterator[Sample]:
        """Pair each image with its captions and companions; those without captions are named together."""
        missing, unfilled = [], []
        for name, file in images.items():
            if not file.is_file() or not is_unicode(name):
                self.faults.append(f"{self.path}: {name!r} is a dead link or its name is not UTF-8; repair it")
                continue
            self.images.append(file)
            captions = self.captions_of(name, file, listing)
            if captions is None:
                missing.append(name)
            elif self.options.trigger is None and any(PLACEHOLDER in caption for caption in captions):
                unfilled.append(name)
            elif captions:
                pair = [self.pairs[name]] if name in self.pairs else []
                listed = [listing.root / reference for reference in listing.references.get(name, pair)]
                yield Sample(
                    id=name,
                    image=file,
                    captions=captions,
                    options=self.options,
                    mask=self.companions.mask(name, file),
                    references=self.companions.references(name, file, listed),
                )
        if missing:
            self.faults.append(self.missing_captions(missing))
        if unfilled:
            self.faults.append(
                f"{self.key}.trigger: not set, but {_count(unfilled, 'caption')} in {self.path} "
                f"{'says' if len(unfilled) == 1 else 'say'} {PLACEHOLDER}; "
                f"set it or edit the captions of{_lines(unfilled)}"
            )

    def captions_of(self, name: str, file: Path, listing: Listing) -> tuple[str, ...] | None:
        """An image's captions; none at all is None, and () stands for a fault that has been noted."""
        said = {where: self.cleaned(texts) for where, texts in listing.texts.get(name, ())}
        if self.path.is_dir():
            of = self.path / self.pairs[name] if name in self.pairs else file
            try:
                said |= {where: self.cleaned(texts) for where, texts in texts_beside(of, self.options.captions).items()}
            except InputError as error:
                self.faults.append(str(error))
                return ()
        if not said:
            return None
        conflict = disagreement(said)
        if conflict:
            self.faults.append(f"{self.path}: {name} {conflict}")
            return ()
        return next(iter(said.values()))

    def cleaned(self, texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(c for text in texts for c in clean(text, self.options.captions, self.options.trigger))

    def missing_captions(self, names: Sequence[str]) -> str:
        """The sentence that a newcomer meets first: what is missing, where it belongs, and the ways out."""
        first, have = Path(names[0]), "has" if len(names) == 1 else "have"
        return (
            f"{self.key}.path: {_count(names, 'image')} in {self.path} {have} "
            f"no caption. Write what {first.as_posix()} shows into {first.with_suffix('.txt').as_posix()} "
            f"(an empty file trains it without words), list it in {METADATA} or {CAPTIONS}, or take it out; "
            f"without a caption:{_lines(names)}"
        )


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _lines(names: Sequence[str]) -> str:
    return "".join(f"\n  {name}" for name in names)
