"""Where the nodes of a store lie: a few files under (kind, key), there as a whole or not at all.

`Nodes` is all that the store asks of such a place; `Folder` is one on a file system, `remote.py` has the other.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flux2_relay.cache import durable, encoding
from flux2_relay.cache.encoding import Damage
from flux2_relay.cache.errors import StoreError

FORMAT = "flux2-relay-cache"
VERSION = 1
GROUPS = (*encoding.DIMENSIONS, "sets", "tmp")
"""The groups of a store; a child of `tmp` counts for nothing."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a writer left behind when it died."""

    changed: float
    """When it was last touched, in seconds since 1970."""
    delete: Callable[[], None]
    node: tuple[str, str, Path] | None = None
    """Kind, key and folder of a node that was taken out of sight."""


class Nodes(Protocol):
    """A place for nodes. A FileNotFoundError names the file that is not there; other trouble: OSError or Damage."""

    @property
    def name(self) -> str:
        """What the user calls it: a path or a URL."""
        ...

    @property
    def path(self) -> Path:
        """Its folder on this machine; of a remote place the folder that holds copies."""
        ...

    def scan(self, kind: str) -> Iterator[str]:
        """List a kind -> names, keys or not."""
        ...

    def has(self, kind: str, key: str) -> bool:
        """Say whether a node is there; it need not be sound."""
        ...

    def exists(self, kind: str, key: str) -> bool:
        """Say whether anything at all has its name."""
        ...

    def read(self, kind: str, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """Read files of a node where it really lies -> bytes by name."""
        ...

    def fetch(self, kind: str, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """Read all files of a node, perhaps from a copy -> bytes by name."""
        ...

    def forget(self, kind: str, key: str) -> bool:
        """Drop the copy that `fetch` may have answered from -> was there one?"""
        ...

    def size(self, kind: str, key: str, name: str) -> int:
        """Size of one file in bytes."""
        ...

    def publish(self, kind: str, key: str, files: Mapping[str, bytes]) -> None:
        """Make a node durable and let it appear, unless it is there already; its files in order of writing."""
        ...

    def confirm(self, kind: str) -> None:
        """Make sure that what is seen of a kind is durable; whoever made it may not have got that far."""
        ...

    def publish_set(self, key: str, zarr_json: bytes) -> None:
        """Put a set in its place, over the one that is there."""
        ...

    def set_aside(self, kind: str, key: str) -> Path | None:
        """Take a node out of sight whole -> the folder that it is in now, None if it was not there."""
        ...

    def put_back(self, aside: Path, kind: str, key: str) -> None:
        """Undo `set_aside`; a node published anew in between stays."""
        ...

    def leftovers(self, everywhere: bool) -> Iterator[Leftover]:
        """What dead writers left; `everywhere`: also what only a list of all objects of a bucket shows."""
        ...


@dataclass(frozen=True, slots=True)
class Folder:
    """Nodes in a folder on a file system, a folder each."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def scan(self, kind: str) -> Iterator[str]:
        """List a kind by one scan of its folder -> names."""
        with os.scandir(self.path / kind) as names:
            yield from (name.name for name in names)

    def has(self, kind: str, key: str) -> bool:
        """Say whether the node's folder is there."""
        return (self.path / kind / key).is_dir()

    def exists(self, kind: str, key: str) -> bool:
        """Say whether anything has its name, be it a link to nothing."""
        return os.path.lexists(self.path / kind / key)

    def read(self, kind: str, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """Read files of a node, of one and the same even if another takes its place meanwhile -> bytes by name."""
        return read_folder(f"{self.path}/{kind}/{key}", names)

    def fetch(self, kind: str, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """Read files of a node; nothing is nearer than a folder."""
        return self.read(kind, key, names)

    def forget(self, kind: str, key: str) -> bool:
        """There are no copies."""
        return False

    def size(self, kind: str, key: str, name: str) -> int:
        """Size of one file in bytes."""
        return os.stat(f"{self.path}/{kind}/{key}/{name}").st_size

    def publish(self, kind: str, key: str, files: Mapping[str, bytes]) -> None:
        """Write aside, fsync, rename."""
        durable.publish_folder(files, self._tmp, self.path / kind / key)

    def confirm(self, kind: str) -> None:
        """Make the names in the kind's folder durable."""
        durable.sync_folder(self.path / kind)

    def publish_set(self, key: str, zarr_json: bytes) -> None:
        """Publish the set, or replace its one file in one step."""
        place = self.path / "sets" / key
        if self.exists("sets", key) and not place.is_dir():  # a link to nothing, or no set at all
            durable.set_aside(place, self._tmp)
        while not durable.publish_folder({"zarr.json": zarr_json}, self._tmp, place):
            if durable.replace_file(zarr_json, self._tmp, place / "zarr.json"):
                break  # else it was dropped between the two calls

    def set_aside(self, kind: str, key: str) -> Path | None:
        """Rename a node into tmp."""
        return durable.set_aside(self.path / kind / key, self._tmp)

    def put_back(self, aside: Path, kind: str, key: str) -> None:
        """Rename it back."""
        durable.put_back(aside, self.path / kind / key)

    def leftovers(self, everywhere: bool) -> Iterator[Leftover]:
        """Children of tmp; a rename counts as a touch, which moves only ctime."""
        with os.scandir(self._tmp) as children:
            for child in children:
                if child.name == "zarr.json":
                    continue
                try:
                    status = child.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # its writer has just finished with it
                path = Path(child.path)
                touched = max(status.st_mtime, status.st_ctime)
                was = durable.was(path)
                yield Leftover(touched, lambda path=path: durable.discard(path), (*was, path) if was else None)

    @property
    def _tmp(self) -> Path:
        return self.path / "tmp"


def read_folder(folder: Path | str, names: Iterable[str]) -> dict[str, bytes]:
    """Read files of one folder -> bytes by name; of that folder also when another gets its name meanwhile.

    Damage for a link to nothing: somebody moved the folder to a disk that is not there now.
    """
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        if os.path.islink(folder):
            raise Damage("it is a link to nothing") from error
        raise
    try:
        return {name: _read_in(opened, name) for name in names}
    finally:
        os.close(opened)


def create_folder(root: Path) -> None:
    """Make an empty store at `root`, whole or not at all, unless something is there."""
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    durable.publish_folder(skeleton(), root.parent, root)


def check_folder(root: Path) -> None:
    """Refuse whatever is not a store of this version, saying what it is instead."""
    if not root.exists():
        raise StoreError(f"{root} does not exist. Run `relay encode` to make it, or correct `cache.path`.")
    if not root.is_dir():
        raise StoreError(f"{root} is a file; a store is a folder. Correct `cache.path`.")
    try:
        zarr_json = (root / "zarr.json").read_bytes()
    except FileNotFoundError as error:
        old = any((root / name).exists() for name in (".zgroup", ".zarray"))
        what = "a Zarr of format 2" if old else "a folder without zarr.json"
        raise StoreError(f"{root} is not a store: it is {what}. Correct `cache.path`.") from error
    except OSError as error:
        raise StoreError(f"{root} cannot be read as a store: {error}.") from error
    check_root(str(root), zarr_json)


def check_root(name: str, zarr_json: bytes) -> None:
    """Refuse a root that is not a store's, or of a version that this program does not read."""
    try:
        attributes = encoding.parse_object(zarr_json).get("attributes", {})
    except Damage as error:
        raise StoreError(f"{name} cannot be read as a store: {error}.") from error
    if attributes.get("format") != FORMAT:
        raise StoreError(f"{name} is a Zarr hierarchy, but not a store of this program. Correct `cache.path`.")
    version = attributes.get("version")
    if type(version) is not int or version != VERSION:
        raise StoreError(
            f"{name} is a store of version {version}; this program reads version {VERSION}. "
            "Use the release that wrote it, or another `cache.path`."
        )


def complete_folder(root: Path) -> None:
    """Put back group folders that a copy left out, and find out now whether the store can be written."""
    for name in GROUPS:
        group = root / name
        if (group / "zarr.json").is_file():
            continue
        files = {"zarr.json": encoding.build_group({})}
        if not group.exists():
            durable.publish_folder(files, root, group)
        else:
            durable.replace_file(files["zarr.json"], root, group / "zarr.json")
    durable.probe(root / "tmp")


def skeleton() -> dict[str, bytes]:
    """An empty store: its zarr.json by path, the root's first."""
    groups = {"zarr.json": encoding.build_group({"format": FORMAT, "version": VERSION})}
    return groups | {f"{name}/zarr.json": encoding.build_group({}) for name in GROUPS}


def _read_in(folder: int, name: str) -> bytes:
    with open(name, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags, dir_fd=folder)) as file:
        return file.readall()
