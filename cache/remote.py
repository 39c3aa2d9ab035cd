"""A store in a bucket (s3://, gs://, az://): the same nodes under the same names, read through copies on this machine.

Object stores have no rename, but a PUT is atomic and can be told to create only. So the chunk is put first and
zarr.json last, and an entry exists when its zarr.json does. Whoever finds a chunk there already describes that one.

Nothing is locked, so `gc` may delete a chunk that a writer is about to describe. Both look again when they are done:
the writer for the chunk after it has put zarr.json, `gc` for a zarr.json (or a set) after it has deleted the chunk.
Whichever came second sees the other and puts the chunk back. This needs a store in which a reader sees at once what
was written, as S3, Google's and Azure's are.

What is read is kept in an ordinary store in the user's cache folder; it may be deleted at any time.
"""

import errno
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flux2_relay.cache import durable, encoding
from flux2_relay.cache.encoding import Damage
from flux2_relay.cache.errors import StoreError
from flux2_relay.cache.nodes import Folder, Leftover, check_folder, check_root, complete_folder, create_folder, skeleton

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")

_TURNS = 20  # more than enough: each is lost only to somebody who writes or deletes the same entry at that moment
_RETRIES = 5  # the client's own, with growing pauses: about half a minute until a dead network is reported


@dataclass(frozen=True, slots=True)
class Bucket:
    """Nodes as objects: `kind/key/name` under a URL."""

    name: str
    objects: "ObjectStore"

    def get(self, path: str) -> bytes:
        """Read one object."""
        import obstore

        with self._answers(path):
            return bytes(obstore.get(self.objects, path).bytes())

    def size(self, path: str) -> int:
        """Size of one object in bytes."""
        import obstore

        with self._answers(path):
            return obstore.head(self.objects, path)["size"]

    def has(self, path: str) -> bool:
        """Say whether an object is there."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def create(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one -> was it us? (`If-None-Match: *`)"""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._answers(path):
            try:
                obstore.put(self.objects, path, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Write an object over what is there."""
        import obstore

        with self._answers(path):
            obstore.put(self.objects, path, data, mode="overwrite")

    def delete(self, path: str) -> None:
        """Delete an object; none is no error."""
        import obstore

        with self._answers(path), suppress(FileNotFoundError):
            obstore.delete(self.objects, path)

    def list(self, prefix: str) -> Iterator[tuple[str, float]]:
        """List the objects below a prefix -> path, time of writing in seconds since 1970."""
        import obstore

        with self._answers(prefix):
            for some in obstore.list(self.objects, prefix or None):
                yield from ((found["path"], found["last_modified"].timestamp()) for found in some)

    def publish(self, kind: str, key: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Put a node, chunk first, zarr.json last -> the node that is there now; whoever was first wins."""
        chunk, zarr_json = (f"{kind}/{key}/{name}" for name in encoding.file_names(kind))
        data, told = (files[name] for name in encoding.file_names(kind))
        alone = self.create(chunk, data) and self.create(zarr_json, told)
        if alone and self._is_there(chunk, len(data)):
            return dict(files)
        return self._settle(kind, key, dict(files))

    def sweep(self, kind: str, key: str) -> None:
        """Delete a chunk whose writer never came to the zarr.json, unless that comes just now."""
        chunk, zarr_json = (f"{kind}/{key}/{name}" for name in encoding.file_names(kind))
        with suppress(FileNotFoundError):
            data = self.get(chunk)
            if not self.has(zarr_json):
                self.delete(chunk)
                if self.has(zarr_json):
                    self.create(chunk, data)

    def _settle(self, kind: str, key: str, node: dict[str, bytes]) -> dict[str, bytes]:
        """Publish beside others who write or delete the same node -> the node that is there now."""
        name = encoding.chunk_name(kind)
        chunk, zarr_json = f"{kind}/{key}/{name}", f"{kind}/{key}/zarr.json"
        for _ in range(_TURNS):
            self.create(chunk, node[name])
            with suppress(FileNotFoundError):  # deleted meanwhile: from the beginning
                node = self._adopt(kind, key, node, self.get(chunk))
                self.create(zarr_json, node["zarr.json"])
                told = self.get(zarr_json)
                right = self._adopt(kind, key, {**node, "zarr.json": told}, node[name])["zarr.json"]
                if told != right:  # it speaks of a chunk that was deleted while it was put
                    self.replace(zarr_json, right)
                elif self._is_there(chunk, len(node[name])):
                    return {**node, "zarr.json": told}
        raise OSError(errno.EBUSY, "others keep writing and deleting it", f"{self.name}/{kind}/{key}")

    def _adopt(self, kind: str, key: str, node: Mapping[str, bytes], chunk: bytes) -> dict[str, bytes]:
        try:
            return encoding.adopt(kind, node, chunk)
        except Damage as damage:
            raise StoreError(
                f"{self.name}/{kind}/{key}/{encoding.chunk_name(kind)} is not an entry's chunk ({damage}). Delete this "
                "object, then run the command again."
            ) from damage

    def _is_there(self, path: str, size: int) -> bool:
        try:
            return self.size(path) == size
        except FileNotFoundError:
            return False

    @contextmanager
    def _answers(self, path: str) -> Iterator[None]:
        """Turn the client's errors into the OSErrors that the store knows."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", f"{self.name}/{path}") from error
        except BaseError as error:
            denied = isinstance(error, PermissionDeniedError | UnauthenticatedError)
            said = str(error).split("\n")[0].split(": <?xml")[0]
            raise OSError(errno.EACCES if denied else errno.ECONNABORTED, said, f"{self.name}/{path}") from error


@dataclass(frozen=True, slots=True)
class Remote:
    """Nodes in a bucket, with copies in a folder."""

    bucket: Bucket
    copies: Folder

    @property
    def name(self) -> str:
        """The URL."""
        return self.bucket.name

    @property
    def path(self) -> Path:
        """The folder that holds copies."""
        return self.copies.path

    def scan(self, kind: str) -> Iterator[str]:
        """List a kind -> names; a chunk without its zarr.json is none."""
        for path, _ in self.bucket.list(kind):
            parts = path.split("/")
            if len(parts) == 3 and parts[2] == "zarr.json":
                yield parts[1]

    def has(self, kind: str, key: str) -> bool:
        """Say whether the node's zarr.json is there."""
        return self.bucket.has(f"{kind}/{key}/zarr.json")

    def exists(self, kind: str, key: str) -> bool:
        """As `has`."""
        return self.has(kind, key)

    def read(self, kind: str, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """Read files of a node from the bucket -> bytes by name."""
        return {name: self.bucket.get(f"{kind}/{key}/{name}") for name in names}

    def fetch(self, kind: str, key: str, names: Iterable[str]) -> dict[str, bytes]:
        """Read a node from its copy, which is made if there is none."""
        names = tuple(names)
        with suppress(OSError, Damage):
            return self.copies.read(kind, key, names)
        node = self.read(kind, key, names)
        self._keep(kind, key, node)
        return node

    def forget(self, kind: str, key: str) -> bool:
        """Delete the copy."""
        aside = self.copies.set_aside(kind, key)
        if aside is not None:
            durable.remove_folder(aside)
        return aside is not None

    def size(self, kind: str, key: str, name: str) -> int:
        """Size of one object in bytes."""
        return self.bucket.size(f"{kind}/{key}/{name}")

    def publish(self, kind: str, key: str, files: Mapping[str, bytes]) -> None:
        """Put the node into the bucket, and keep a copy of what is there then."""
        self._keep(kind, key, self.bucket.publish(kind, key, files))

    def confirm(self, kind: str) -> None:
        """An answered PUT is durable."""

    def publish_set(self, key: str, zarr_json: bytes) -> None:
        """Put the set, in one step."""
        self.bucket.replace(f"sets/{key}/zarr.json", zarr_json)

    def set_aside(self, kind: str, key: str) -> Path | None:
        """Move a node into the copies' tmp: zarr.json goes first, so that no reader misses the chunk."""
        if not self.has(kind, key):
            return None
        aside = durable.aside_of(kind, key, self.path / "tmp")
        aside.mkdir()
        names = ("zarr.json",) if kind == "sets" else encoding.file_names(kind)
        for name in names:
            with suppress(FileNotFoundError):
                durable.write_and_sync(aside / name, self.bucket.get(f"{kind}/{key}/{name}"))
        for name in (*reversed(names), "zarr.json"):  # twice: a writer may have put it anew, beside the old chunk
            self.bucket.delete(f"{kind}/{key}/{name}")
        self.forget(kind, key)
        return aside

    def put_back(self, aside: Path, kind: str, key: str) -> None:
        """Put it into the bucket again."""
        node = {path.name: path.read_bytes() for path in aside.iterdir()}
        if kind == "sets":
            self.bucket.create(f"{kind}/{key}/zarr.json", node["zarr.json"])
        elif set(node) == set(encoding.file_names(kind)):  # else it was damaged, or another `gc` has all of it
            self.bucket.publish(kind, key, node)
        durable.discard(aside)

    def leftovers(self, everywhere: bool) -> Iterator[Leftover]:
        """Children of the copies' tmp; `everywhere`: also chunks whose writer never came to the zarr.json."""
        yield from self.copies.leftovers(everywhere)
        for kind in encoding.DIMENSIONS if everywhere else ():
            found = {path: changed for path, changed in self.bucket.list(kind) if path.count("/") == 2}
            for path, changed in found.items():
                key, name = path.split("/")[1:]
                if name == encoding.chunk_name(kind) and f"{kind}/{key}/zarr.json" not in found:
                    yield Leftover(changed, lambda kind=kind, key=key: self.bucket.sweep(kind, key))

    def _keep(self, kind: str, key: str, node: Mapping[str, bytes]) -> None:
        with suppress(OSError):  # a full disk here costs only the copy
            self.copies.publish(kind, key, node)


def open_nodes(url: str, mode: Literal["r", "a"]) -> Remote:
    """Open a store in a bucket; "a" makes it if the place is empty, and tries at once whether it can write.

    Credentials, region and endpoint come from the environment, as the clouds' own tools have them.
    """
    url = url.rstrip("/")
    try:
        bucket = Bucket(url, _connect(url))
        _open_root(bucket, mode)
    except OSError as error:
        raise StoreError(f"{url} cannot be reached or used: {error.strerror}.") from error
    copies = copies_folder(url)
    try:
        create_folder(copies)
        check_folder(copies)
        complete_folder(copies)
    except OSError as error:
        raise StoreError(
            f"{copies} cannot be written ({error.strerror}); it holds copies of {url}. Make room there, or set "
            "XDG_CACHE_HOME to another folder."
        ) from error
    return Remote(bucket, Folder(copies))


def copies_folder(url: str) -> Path:
    """Where the copies of a remote store are kept on this machine."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return durable.memory_folder() / "stores" / f"{url.rsplit('/', 1)[-1].removesuffix('.zarr')}-{digest}.zarr"


def _connect(url: str) -> "ObjectStore":
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES or not rest:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreError(f"{url}: a store is a folder, or a bucket and a path in it after one of {known}.")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise StoreError(f"{url}: stores in buckets need the extra `remote`: install `flux2-relay[remote]`.") from error
    try:
        return from_url(url, retry_config={"max_retries": _RETRIES})
    except (BaseError, ValueError) as error:
        raise StoreError(f"{url}: {str(error).splitlines()[0]}.") from error


def _open_root(bucket: Bucket, mode: Literal["r", "a"]) -> None:
    try:
        root = bucket.get("zarr.json")
    except FileNotFoundError as error:
        if mode == "r":
            raise StoreError(
                f"{bucket.name} does not exist. Run `relay encode` or `relay cache push` to make it, or correct "
                "`cache.path`."
            ) from error
        if next(bucket.list(""), None) is not None:
            raise StoreError(f"{bucket.name} is not a store: it holds other objects. Correct `cache.path`.") from error
        root = skeleton()["zarr.json"]
        bucket.create("zarr.json", root)
    check_root(bucket.name, root)
    if mode == "a":
        groups = skeleton()
        for path in groups:
            if bucket.create(path, groups[path]) and path == "zarr.json":  # which is there
                raise StoreError(
                    f"{bucket.name}: this object store overwrites what it is told to create only (If-None-Match), so "
                    "two writers could damage an entry. Encode into a folder, and copy that."
                )
        bucket.replace("tmp/zarr.json", groups["tmp/zarr.json"])  # shows whether we may write
