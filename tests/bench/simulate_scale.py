"""A store of a million pictures on paper: `python tests/bench/simulate_scale.py [PICTURES] [ENCODERS]`.

Two tables. The first is arithmetic: bytes, requests, seconds and money, from the sizes that were measured and from the
assumptions below, which are nobody's measurements. The second plays the encoders: each looks whether its next entry is
there and makes it if not, and some are killed. The same arguments print the same tables, on every machine.

`docs/scale.md` shows both and says what follows.
"""

import heapq
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flux2_relay.cache.keys import key_of
from flux2_relay.cache.sets import build_set
from flux2_relay.stages.encode.sharing import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumed:
    """What nobody measured for this: change it to your own."""

    pictures_a_second: float = 3.0  # of one encoder, at 1024 x 1024
    captions_a_second: float = 20.0  # of one encoder, FLUX.2 dev
    picture_bytes: float = 3e6  # of an image file
    read_bytes_a_second: float = 1e9  # of one machine from where the pictures lie
    get_seconds: float = 0.02  # a GET or HEAD of a small object
    put_seconds: float = 0.04
    list_seconds: float = 0.1  # a page of 1,000 names
    dollars_a_million_puts: float = 5.0  # LIST costs the same
    dollars_a_million_gets: float = 0.4
    dollars_a_gigabyte_month: float = 0.023


CAPTION_BYTES, LATENTS_BYTES, JSON_BYTES = 1.30e6, 0.89e6, 1200
"""Stored: a caption of dev and a picture's latents in float16, measured; zarr.json, about."""
REQUESTS_AN_ENTRY = 1, 2, 1  # looks whether it is there, puts of chunk and zarr.json, looks for the chunk again
PAGE = 1000


def arithmetic(pictures: int, encoders: int, assumed: Assumed) -> Iterator[tuple[str, str]]:
    """What it comes to -> lines of (what, how much)."""
    entries, objects = 2 * pictures, 4 * pictures
    stored = pictures * (CAPTION_BYTES + LATENTS_BYTES + 2 * JSON_BYTES)
    of_set = set_bytes(pictures)
    second = 1 / assumed.pictures_a_second + 1 / assumed.captions_a_second
    rate = encoders / second
    looks, puts = (entries * n for n in (REQUESTS_AN_ENTRY[0] + REQUESTS_AN_ENTRY[2], REQUESTS_AN_ENTRY[1]))
    pages = objects / PAGE
    lists = encoders * 3 * pages  # at the beginning, and after each of two rounds at the end
    writing = 2 * (2 * assumed.put_seconds + assumed.get_seconds)
    a_gc = 2 * pages * assumed.list_seconds  # entries, then leftovers
    garbage = 8 * assumed.get_seconds
    money = ((puts + lists) * assumed.dollars_a_million_puts + looks * assumed.dollars_a_million_gets) / 1e6
    yield "entries, objects", f"{entries:,}, {objects:,}"
    yield "stored", f"{stored / 1e12:.2f} TB, {stored / 1e9 * assumed.dollars_a_gigabyte_month:,.0f} $ a month"
    yield "encoding, all encoders", f"{rate:,.0f} pictures a second, {pictures / rate / 3600:.1f} h"
    yield "put by all of them", f"{2 * rate * 2:,.0f} PUT a second, {rate * stored / pictures / 1e6:,.0f} MB a second"
    yield "writer's share of an encoder's time", f"{100 * writing / second:.0f} %, beside the encoding"
    yield "one list of all entries", f"{pages:,.0f} pages, {pages * assumed.list_seconds / 60:.1f} min"
    yield "the set", f"{of_set / 1e6:.0f} MB; written by all encoders {encoders * of_set / 1e9:.0f} GB"
    yield "requests", f"{puts / 1e6:.1f} M PUT, {looks / 1e6:.1f} M HEAD, {lists / 1e6:.1f} M LIST: {money:.0f} $"
    hashed = pictures * assumed.picture_bytes
    hours = hashed / assumed.read_bytes_a_second / 3600
    yield (
        "hashing pictures, each encoder",
        f"{hashed / 1e12:.1f} TB, {hours:.1f} h; all {encoders * hashed / 1e12:.0f} TB",
    )
    yield "gc that finds nothing", f"{a_gc / 60:.0f} min"
    yield "gc, a tenth of the entries", f"{entries / 10 * garbage / 3600:.0f} h"


def set_bytes(pictures: int) -> float:
    """Size of the set of so many pictures, from that of a thousand."""
    samples = [
        {
            "id": f"{n:07d}",
            "text": [key_of({"text": n})],
            "latents": [{"key": key_of({"latents": n}), "h": 64, "w": 64, "references": [], "mask": None}],
            "repeats": 1,
            "prior": False,
        }
        for n in range(1000)
    ]
    empty, full = (len(build_set({"name": "x", "samples": of}, {"at": "x"})[1]) for of in ([], samples))
    return empty + (full - empty) / 1000 * pictures


@dataclass(frozen=True, slots=True)
class Played:
    """How a farm did: relative to encoders that never wait and never double."""

    seconds: float  # until everything is there that will be; 1 is ideal
    ended: float  # until the last encoder has looked at all it has to
    doubled: float  # entries made in vain, as a share of all
    looks: float  # HEAD requests an entry
    missing: int  # entries that nobody made


def play(orders: Sequence[Sequence[int]], make: Sequence[float], look: float, kills: Sequence[float]) -> Played:
    """Encoders that go through `orders`, entry by entry, until each is at its end.

    `make`: seconds an entry takes each encoder; `look`: seconds to ask whether one is there; `kills`: when each dies.
    """
    entries = len({entry for order in orders for entry in order})
    ready: dict[int, float] = {}  # entry -> when it came to be there
    position, made, looks, last, ended = [0] * len(orders), 0, 0, 0.0, 0.0
    waiting = [(0.0, worker) for worker in range(len(orders))]
    heapq.heapify(waiting)
    while waiting:
        now, worker = heapq.heappop(waiting)
        if position[worker] == len(orders[worker]):
            ended = max(ended, now)
            continue
        entry, looks = orders[worker][position[worker]], looks + 1
        position[worker] += 1
        after = now + look
        if ready.get(entry, float("inf")) > now:  # not there when it looks
            after += make[worker]
            if after > kills[worker]:
                continue
            made += 1
            ready[entry] = min(after, ready.get(entry, float("inf")))
            last = max(last, ready[entry])
        if after <= kills[worker]:
            heapq.heappush(waiting, (after, worker))
    ideal = entries / sum(1 / seconds for seconds in make)
    return Played(last / ideal, ended / ideal, (made - len(ready)) / entries, looks / entries, entries - len(ready))


def orders_of(policy: str, entries: int, encoders: int, dice: random.Random) -> list[list[int]]:
    """In which order each encoder goes through which entries."""
    if policy == "shards":
        keys = [key_of({"entry": n}) for n in range(entries)]
        shards = [Shard(number + 1, encoders) for number in range(encoders)]
        return [[n for n in range(entries) if shard.holds(keys[n])] for shard in shards]
    if policy == "own order":
        return [dice.sample(range(entries), entries) for _ in range(encoders)]
    starts = [dice.randrange(entries) for _ in range(encoders)]  # "own start", as it was once
    return [[*range(start, entries), *range(start)] for start in starts]


POLICIES = "own start", "own order", "shards"


def farm(policy: str, entries: int, encoders: int, look: float, killed: int, seed: int = 0) -> Played:
    """A farm whose encoders differ in speed by up to a half, `killed` of them ending halfway on the average."""
    dice = random.Random(seed)
    make = [dice.uniform(0.75, 1.25) for _ in range(encoders)]
    orders = orders_of(policy, entries, encoders, dice)
    usual = entries / encoders
    kills = [dice.uniform(0, usual) if worker < killed else float("inf") for worker in range(encoders)]
    return play(orders, make, look, kills)


def main() -> None:
    """Print both tables."""
    pictures, encoders = (int(given) for given in (*sys.argv[1:], *("1000000", "64")[len(sys.argv) - 1 :]))
    print(f"{pictures:,} pictures, {encoders} encoders\n\n| | |\n|---|---|")
    for what, much in arithmetic(pictures, encoders, Assumed()):
        print(f"| {what} | {much} |")
    entries = 200 * encoders
    print(f"\n{entries:,} entries; seconds are of the ideal\n")
    print("| dealt by | a look costs, of an entry | killed | complete | all ended | made twice | looks | missing |")
    print("|---|---|---|---|---|---|---|---|")
    for look in (0.0001, 0.05):
        for killed in (0, encoders // 8):
            for policy in POLICIES:
                of = farm(policy, entries, encoders, look, killed)
                row = f"{of.seconds:.2f} | {of.ended:.2f} | {100 * of.doubled:.1f} % | {of.looks:.1f} | {of.missing:,}"
                print(f"| {policy} | {100 * look:g} % | {killed} | {row} |")


if __name__ == "__main__":
    main()
