"""How the work of stage one is divided among processes that fill one store.

Nothing is locked: an entry that two make at the same time is merely made twice. Without a word about it, each process
takes the missing entries in an order of its own and leaves out what is there by then, and what others say that they are
at (`claims.py`). Told its shard, a process takes only the keys that fall to it, which are the same on every machine.
"""

import random
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flux2_relay.cache.errors import InputError

Of = TypeVar("Of")


@dataclass(frozen=True, slots=True)
class Shard:
    """Share `number` (from 1) of `count`; the only one of one is everything."""

    number: int = 1
    count: int = 1

    def holds(self, key: str) -> bool:
        """Whether an entry falls to it."""
        return int(key[:8], 16) % self.count == self.number - 1

    def of(self, keys: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Those of the keys by kind that fall to it; kinds without any are left out."""
        mine = {kind: [key for key in of_kind if self.holds(key)] for kind, of_kind in keys.items()}
        return {kind: of_kind for kind, of_kind in mine.items() if of_kind}


WHOLE = Shard()


def shard(text: str) -> Shard:
    """The shard that `I/N` stands for; InputError where it stands for none."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--shard {text}: takes I/N, the share and how many there are, from 1/N to N/N")
    return Shard(int(found[1]), int(found[2]))


def own_order(wants: Mapping[str, Of]) -> dict[str, Of]:
    """The same in an order that no other process has: two then meet at an entry here and there, not at one after other.

    From places of their own through one common order, whoever is done first would walk into what the next is at, and
    both would go on side by side, making every entry twice.
    """
    items = list(wants.items())
    random.Random(secrets.randbits(64)).shuffle(items)
    return dict(items)
