"""What each of several processes that fill one store is at, told to the others: so that nothing is made twice.

A claim is a small file named after an entry, in the store's `tmp`. It is advice, not a lock. Nobody waits for a process
that is gone, or that has shown no sign of life for ten minutes: its claims are taken over. Where claims cannot be
written, everybody works as if alone; then, and where two take over at once, an entry is made twice, which changes
nothing. Of a store in a bucket the claims lie beside the copies, and are seen on this machine alone.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from pathlib import Path
from types import TracebackType

_SILENT_SECONDS = 600.0  # a layer over a batch, or a large picture, may take minutes on a CPU
_SIGN_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_OWNER = "by-"


class Claims:
    """The claims of this process, and what it sees of others'.

    with Claims(folder) as claims:
        mine = claims.take(keys)  # somebody else is at those that are not in it
        ...  # make and commit them
        claims.release()
    """

    def __init__(self, folder: Path, wait: Callable[[float], None] = time.sleep) -> None:
        """`folder` is the same for all that fill the store; it is made when first needed, and goes when it is empty."""
        self._folder, self._wait = folder, wait
        self._name = f"{_OWNER}{os.getpid()}-{secrets.token_hex(4)}-{socket.gethostname()}"
        self._taken: list[str] = []
        self._signed = -inf

    def take(self, keys: Iterable[str]) -> list[str]:
        """Claim what nobody else is at -> these keys, in order. Look for each in the store afterwards, not before.

        Somebody may have made an entry, and let go of it, since it was found missing.
        """
        self.sign()
        return [key for key in keys if self._take(key)]

    def release(self) -> None:
        """Let go of everything; what was made has to be committed before."""
        while self._taken:
            with suppress(OSError):
                (self._folder / self._taken.pop()).unlink()

    def sign(self) -> None:
        """Show that this process is alive; to be called often while it works."""
        if time.monotonic() - self._signed < _SIGN_SECONDS:
            return
        self._signed = time.monotonic()
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / self._name).touch()
            os.utime(self._folder)  # by its age it is swept up

    def others(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that another living process is at."""
        try:
            claimed = set(os.listdir(self._folder))
        except OSError:
            return []
        return [key for key in keys if key in claimed and self._is_others(key)]

    def free(self, keys: Iterable[str]) -> list[str]:
        """The rest of them."""
        keys = list(keys)
        theirs = set(self.others(keys))
        return [key for key in keys if key not in theirs]

    def wait_for(self, keys: Iterable[str], is_there: Callable[[str], bool]) -> None:
        """Wait until these are there, or whoever was at them is gone; who waits holds nothing himself."""
        self.release()
        for key in keys:
            while self._is_others(key) and not is_there(key):
                self._wait(_LOOK_SECONDS)

    def __enter__(self) -> "Claims":
        """Sweep up what dead processes claimed."""
        with suppress(OSError):
            for claim in self._folder.iterdir():
                if self._is_silent(claim.name if claim.name.startswith(_OWNER) else _read(claim)):
                    claim.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing behind."""
        self.release()
        with suppress(OSError):
            (self._folder / self._name).unlink(missing_ok=True)
            self._folder.rmdir()

    def _take(self, key: str) -> bool:
        place = self._folder / key
        for _ in range(2):
            try:
                with open(place, "x") as file:
                    file.write(self._name)
            except FileExistsError:
                if self._is_others(key):
                    return False
                with suppress(OSError):
                    place.unlink()
            except FileNotFoundError:  # whoever left last has taken the folder along
                self._signed = -inf
                self.sign()
            except OSError:  # a full disk: a claim without a name would be waited for
                with suppress(OSError):
                    place.unlink()
                return True
            else:
                self._taken.append(key)
                return True
        return True

    def _is_others(self, key: str) -> bool:
        """Whether a living process other than this one is at it."""
        owner = _read(self._folder / key)
        return owner is not None and owner != self._name and not self._is_silent(owner or key)

    def _is_silent(self, name: str | None) -> bool:
        """Whether the process that signs this file is gone, or has long not shown that it lives.

        Ages are told by the clock of the file system, which is the same for every machine.
        """
        if name is None or _is_gone(name):
            return True
        try:
            signed = (self._folder / name).stat().st_mtime
        except OSError:
            return True
        return self._now() - signed > _SILENT_SECONDS

    def _now(self) -> float:
        self.sign()
        try:
            return (self._folder / self._name).stat().st_mtime + time.monotonic() - self._signed
        except OSError:
            return time.time()


def _read(claim: Path) -> str | None:
    """Who has it; empty while it is being written, None where there is none."""
    try:
        return claim.read_text()
    except OSError:
        return None


def _is_gone(owner: str) -> bool:
    """Whether it was a process of this machine that has ended; of another machine that cannot be known."""
    number, _, host = owner.removeprefix(_OWNER).partition("-")
    if host.partition("-")[2] != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
