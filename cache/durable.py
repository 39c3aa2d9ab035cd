"""Bytes first, name last: the few file-system calls that make an entry durable and whole.

Only mkdir, write, fsync and rename are asked for, no locks, no links: APFS, exFAT, SMB and NFS will do.
"""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_FULL_FLUSH: int | None = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync does not empty the drive's own cache
_NOT_OFFERED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}


def publish_folder(files: Mapping[str, bytes], tmp: Path, place: Path) -> bool:
    """Make folder `place` appear with `files` in it, all of them or none -> was it us who made it appear?

    `files` maps names (with "/" for sub-folders) to bytes, in the order in which they are written. `tmp` is a
    folder on the same file system. A crash leaves at most a child of `tmp`; an exception not even that.
    """
    aside = tmp / uuid4().hex
    try:
        _write_folder(aside, files)  # the bytes are on the disk ...
        won = _rename_unless_there(aside, place)  # ... before they have a name
    except BaseException:  # Ctrl-C too
        remove_folder(aside)
        raise
    if not won:
        remove_folder(aside)
    sync_folder(place.parent)  # the loser as well: the winner may not have come to this line yet
    return won


def replace_file(data: bytes, tmp: Path, place: Path) -> bool:
    """Put `data` in the place of an existing file in one step -> False if its folder was not there."""
    aside = tmp / uuid4().hex
    try:
        _write_folder(aside, {place.name: data})
        os.rename(aside / place.name, place)
        sync_folder(place.parent)
    except FileNotFoundError:  # it may be there again by now: ask nobody, try again
        return False
    finally:
        remove_folder(aside)
    return True


def set_aside(place: Path, tmp: Path) -> Path | None:
    """Take a folder out of sight whole, into `tmp` -> where it is now, or None if it was not there."""
    aside = aside_of(place.parent.name, place.name, tmp)
    with suppress(OSError):  # somebody else's folder, or gone: the rename decides
        os.utime(place)  # old children of tmp are deleted by age: this one begins to count now
    try:
        os.rename(place, aside)
    except FileNotFoundError:
        return None
    sync_folder(place.parent)
    return aside


def put_back(aside: Path, place: Path) -> None:
    """Undo `set_aside`; if somebody has published `place` anew meanwhile, theirs stays."""
    if not _rename_unless_there(aside, place):
        discard(aside)
    sync_folder(place.parent)


def aside_of(kind: str, key: str, tmp: Path) -> Path:
    """A new name in `tmp` for what is taken out of sight; it tells what it was, should nobody live to decide on it."""
    return tmp / f"{kind}.{key}.{uuid4().hex}"


def was(aside: Path) -> tuple[str, str] | None:
    """What lies in a child of `tmp` that `set_aside` made -> (kind, key), or None."""
    parts = aside.name.split(".")
    return (parts[0], parts[1]) if len(parts) == 3 else None


def discard(path: Path) -> None:
    """Delete a child of `tmp`, unless somebody else has just taken it.

    It loses its name first: a writer may wake up after a day, or clocks differ by one, and what he then puts into the
    store must not be half deleted.
    """
    nameless = path.with_name(uuid4().hex)
    with suppress(OSError):  # gone, or not to be deleted: what stays is swept up by age
        os.rename(path, nameless)
        remove_folder(nameless)


def probe(tmp: Path) -> None:
    """Find out whether `tmp` can be written, leaving nothing behind."""
    aside = tmp / uuid4().hex
    os.mkdir(aside)
    os.rmdir(aside)


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a new file and wait until its bytes have left for the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, on macOS with all data written before; skipped if not offered."""
    fd = os.open(path, os.O_RDONLY)
    try:
        _flush(fd)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(fd)


def remove_folder(path: Path) -> None:
    """Delete a folder in `tmp` as far as that goes; what stays is swept up by age."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def memory_folder() -> Path:
    """The user's folder for what can be made again: `$XDG_CACHE_HOME` or the system's place, then flux2-relay."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "flux2-relay"
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return home / "flux2-relay"


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    os.mkdir(folder)
    inner = {str(Path(name).parent) for name in files} - {"."}
    for name in sorted(inner):
        os.mkdir(folder / name)
    for name, data in files.items():
        write_and_sync(folder / name, data)
    for name in sorted(inner):
        sync_folder(folder / name)
    sync_folder(folder)


def _rename_unless_there(aside: Path, place: Path) -> bool:
    try:
        os.rename(aside, place)
    except OSError:
        # Another writer was first; on NFS it may be our own call, sent twice. Either way it is committed.
        if not (place / "zarr.json").is_file():
            raise
        return False
    return True


def _flush(fd: int) -> None:
    if _FULL_FLUSH is not None:
        try:
            fcntl.fcntl(fd, _FULL_FLUSH)
        except OSError as error:  # SMB and some NFS know only fsync
            if error.errno not in _NOT_OFFERED:
                raise
        else:
            return
    os.fsync(fd)
