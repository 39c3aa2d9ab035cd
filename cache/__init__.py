"""The room of the store: code; the store itself is wherever `cache.path` points.

It keeps arrays under keys and knows neither models nor images. Read in this order:
    errors.py    the errors of the house
    keys.py      what an entry depends on, hashed
    chunks.py    an array as one chunk of a Zarr array, and back
    encoding.py  an entry as the two files of a Zarr v3 array
    durable.py   bytes first, name last: write, fsync, rename
    nodes.py     where entries lie: a folder ...
    remote.py    ... or a bucket, with copies on this machine
    sets.py      what one config needs, as one record
    store.py     open, publish, read, remove
    transfer.py  from one store to another
    writer.py    publishing behind a short queue
    audit.py     verify, gc, stats
    explain.py   why an entry does not fit
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux2_relay.cache.encoding import Entry
    from flux2_relay.cache.store import Store, open

__all__ = ["Entry", "Store", "open"]

_HOMES = {"Entry": "encoding", "Store": "store", "open": "store"}


def __getattr__(name: str) -> object:
    """Import the store when it is first asked for: `relay --help` needs only the errors, not NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"{__name__} has no {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
