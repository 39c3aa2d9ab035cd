"""Where captions stand and how they are cleaned; the one place that changes a caption's text.

A caption that leaves here is exactly what the text encoder's template gets, and part of the key of its entry.
Nothing is normalised beyond what is written here: composed and decomposed letters are different tokens.
"""

import csv
import difflib
import io
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flux2_relay.cache.errors import InputError

Mode = Literal["whole", "lines"]
PLACEHOLDER = "[trigger]"
METADATA, TABLE, CAPTIONS = "metadata.jsonl", "metadata.csv", "captions.json"
_CONTROL_KEY = re.compile(r"(?:control_path|edit_image)(?:_(\d+))?")
_NAME_KEYS, _TEXT_KEYS = ("file_name", "image_path", "image"), ("text", "caption", "prompt")


def clean(text: str, mode: Mode, trigger: str | None) -> tuple[str, ...]:
    """The captions that one text holds: all of it, or one a line with blank lines dropped.

    Outer whitespace goes, and an empty text is one empty caption. ``trigger`` takes the place of
    ``[trigger]`` and is put in front where the caption still lacks it as a word of its own.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts = [part.strip() for part in (text.split("\n") if mode == "lines" else [text])]
    kept = [part for part in parts if part] or [""]
    return tuple(_with_trigger(part, trigger) for part in kept)


def _with_trigger(caption: str, trigger: str | None) -> str:
    if trigger is None:
        return caption
    caption = caption.replace(PLACEHOLDER, trigger)
    is_there = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption)  # "fox" is not in "foxglove"
    return caption if is_there else f"{trigger} {caption}".strip()


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, a byte-order mark at its start left out; InputError names the file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise InputError(f"{path}: is not UTF-8 ({byte}); save it as UTF-8") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


@dataclass(frozen=True, slots=True)
class Listing:
    """What files such as metadata.jsonl say of the images below ``root``, and what is wrong in them.

    ``texts``: image -> [(where it is said, captions)]; ``references``: image -> reference images. An image is named
    by its path below ``root``, with "/" and composed letters.
    """

    root: Path
    texts: dict[str, list[tuple[str, list[str]]]] = field(default_factory=dict)
    references: dict[str, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def read_jsonl(self, path: Path) -> None:
        """Take in a file with one object a line: a file name and a text."""
        lines = self._content(path).split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._row(_json(line), path.parent, f"{path}:{number}")

    def read_table(self, path: Path) -> None:
        """Take in a CSV file whose first line names the columns as the keys of a JSON object would be."""
        rows = csv.DictReader(io.StringIO(self._content(path), newline=""), strict=True)
        try:
            for row in rows:
                cells = ((key, value) for key, value in row.items() if isinstance(key, str) and value is not None)
                values = {key: value for key, value in cells if value or not _CONTROL_KEY.fullmatch(key)}
                self._row(values, path.parent, f"{path}:{rows.line_num}")
        except csv.Error as error:
            self.faults.append(f"{path}:{rows.line_num}: cannot be read as CSV ({error})")

    def read_captions(self, path: Path) -> None:
        """Take in a captions.json: file name -> one text, or a list of them."""
        content = self._content(path)
        table = _json(content)
        if isinstance(table, dict):
            for name, texts in table.items():
                self._add(name, texts, path.parent, str(path))
        elif content:
            self.faults.append(f"{path}: must be a JSON object: file name to caption or list of captions")

    def _content(self, path: Path) -> str:
        try:
            return read_text(path)
        except InputError as error:
            self.faults.append(str(error))
            return ""

    def _row(self, row: object, folder: Path, where: str) -> None:
        if not isinstance(row, dict):
            self.faults.append(f'{where}: must be a JSON object such as {{"file_name": "a.png", "text": "a fox"}}')
            return
        name = next((row[key] for key in _NAME_KEYS if key in row), None)
        texts = next((row[key] for key in _TEXT_KEYS if key in row), None)
        if not isinstance(name, str):
            self.faults.append(f"{where}: names no image; give it under 'file_name'")
        else:
            self._add(name, texts, folder, where)
            self._add_references(name, row, folder, where)

    def _add_references(self, name: str, row: Mapping[str, object], folder: Path, where: str) -> None:
        """Note `control_path` or `edit_image`, or those with `_0` and so on in the order of their numbers."""
        numbers = {int(found[1] or -1): key for key in row if (found := _CONTROL_KEY.fullmatch(key))}
        image, found = _below(folder / name, self.root), []
        told = [(key, row[key]) for _, key in sorted(numbers.items())]
        for key, value in ((key, one) for key, many in told for one in (many if isinstance(many, list) else [many])):
            path = _below(folder / value, self.root) if isinstance(value, str) and is_unicode(value) else None
            if path is None:
                self.faults.append(f"{where}: {key} must be the path of an image inside {self.root}, found {value!r}")
            elif not (self.root / path).is_file():
                self.faults.append(f"{where}: there is no reference image {value}; correct {key}")
            else:
                found.append(path)
        if found and image and self.references.setdefault(image, found) != found:
            self.faults.append(f"{where}: {name} has other references in another line; keep one")

    def _add(self, name: str, texts: object, folder: Path, where: str) -> None:
        """Note the texts of one image after checking both."""
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            self.faults.append(f"{where}: gives {name} no caption; write it as text under 'text' (\"\" for none)")
            return
        image = _below(folder / name, self.root)
        if image is None:
            self.faults.append(f"{where}: {name} leads out of {self.root}; images must lie inside the data set")
        elif any(not is_unicode(text) for text in (name, *texts)):
            self.faults.append(f"{where}: {name!r} has half a character (a lone surrogate); save it as UTF-8")
        else:
            self.texts.setdefault(image, []).append((where, texts))

    def check_names(self, images: Collection[str], known_types: Collection[str]) -> Iterator[str]:
        """A sentence for each listed image that is not one of ``images``."""
        for name, said in self.texts.items():
            if name in images:
                continue
            where = said[0][0]
            if (self.root / name).exists() and Path(name).suffix.lower() not in known_types:
                yield f"{where}: {name} is of a type that is not read; convert it to PNG"
                continue
            near = difflib.get_close_matches(name, images, n=1)
            hint = f"did you mean {near[0]}?" if near else "correct the name or delete the entry"
            yield f"{where}: there is no image {name}; {hint}"


def composed(name: str) -> str:
    """A file name with composed letters: some file systems hand them out decomposed."""
    return unicodedata.normalize("NFC", name)


def disagreement(said: Mapping[str, tuple[str, ...]]) -> str | None:
    """Where two places give one image different captions: a sentence naming both; None if all agree."""
    (first, captions), *others = said.items()
    other = next((where for where, there in others if there != captions), None)
    return f"has one caption in {first} and another in {other}; keep one" if other else None


def _below(path: Path, root: Path) -> str | None:
    """``path`` as written below ``root``, None where it leads out; links are not followed."""
    relative = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
    outside = relative == os.curdir or Path(relative).parts[0] == os.pardir
    return None if outside else composed(Path(relative).as_posix())


def _json(text: str) -> object:
    """The value of a JSON text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON escapes and odd file names may hold half a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
