"""A table of wrong inputs has these: how a sound project is spoilt, which command meets it, and what it must say."""

import hashlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import compress, crc32

from tiny.project import Outcome, Project, relay

Spoil = Callable[[Project], object]


@dataclass(frozen=True)
class Case:
    """One wrong input."""

    name: str
    command: str
    """The arguments behind `relay`; {config}, {run}, {store}, {data} and {folder} are the project's."""
    spoil: Spoil
    said: tuple[str, ...]
    """What the message must hold."""
    status: int = 2


def run(case: Case, project: Project) -> Outcome:
    """The command on a spoilt project; an error that is no plain sentence comes through as the exception it is."""
    case.spoil(project)
    places = {name: getattr(project, name) for name in ("config", "run", "store", "data", "folder")}
    words = [word.format(**places) for word in case.command.split()]
    is_bare = "{" in case.command or words[0] in ("models", "cache", "init", "import", "decode", "report")
    return relay(*words) if is_bare else project.relay(words[0], *words[1:])


def check(case: Case, outcome: Outcome) -> None:
    """Exit status, words, one to three sentences a fault, no traceback."""
    assert outcome.status == case.status, outcome.said
    for words in case.said:
        assert words in outcome.said, outcome.said
    complaint = outcome.said[outcome.said.rindex("relay: ") if "relay: " in outcome.said else 0 :]
    assert "Traceback" not in outcome.said
    assert "Error(" not in complaint.replace("JSONDecodeError(", ""), complaint
    for line in complaint.splitlines():
        assert len(re.findall(r"[.?!](?: |$)", line)) <= 3, line
        assert len(line) < 700, line


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash: what must be the same after a refusal.

    The groups of a store without an entry do not count: a store may be made before the last fault shows.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    stores = [path.parent for path in folder.rglob("latents") if (path.parent / "zarr.json").is_file()]
    empty = {store for store in stores if not any(map(_holds, store.iterdir()))}
    kept = [path for path in files if not any(store in path.parents for store in empty)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def _holds(group: Path) -> bool:
    """Whether a group of a store has entries."""
    return group.is_dir() and any(path.is_dir() for path in group.iterdir())


# Ways to spoil


def text(name: str, content: str | bytes) -> Spoil:
    """Write a file of the data set."""

    def spoil(project: Project) -> None:
        path = project.data / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def config(**changes: dict[str, object]) -> Spoil:
    """Change sections of the config."""
    return lambda project: project.write(changes)


def raw(content: str | bytes) -> Spoil:
    """Replace the whole config."""
    return lambda project: project.config.write_bytes(content.encode() if isinstance(content, str) else content)


def in_config(old: str, new: str) -> Spoil:
    """Replace words of the config."""

    def spoil(project: Project) -> None:
        before = project.config.read_text()
        assert old in before
        project.config.write_text(before.replace(old, new, 1))

    return spoil


def after(*steps: Spoil) -> Spoil:
    """One after the other."""
    return lambda project: [step(project) for step in steps]


def nothing(_: Project) -> None:
    """The arguments are wrong already."""


def weights(project: Project, part: str) -> Path:
    """The file of a part's weights."""
    (file,) = (project.model / part).glob("*.safetensors")
    return file


def truncated(part: str) -> Spoil:
    """A download that was cut off."""

    def spoil(project: Project) -> None:
        file = weights(project, part)
        file.write_bytes(file.read_bytes()[:-100])

    return spoil


def header(part: str, old: bytes, new: bytes) -> Spoil:
    """Other words in the table of a weights file."""

    def spoil(project: Project) -> None:
        file = weights(project, part)
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        table = content[8 : 8 + length]
        assert old in table
        table = table.replace(old, new, 1).rstrip()
        file.write_bytes(struct.pack("<Q", len(table)) + table + content[8 + length :])

    return spoil


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims to be so large."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", compress(b"")), (b"IEND", b"")
    framed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)
