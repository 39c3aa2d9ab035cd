"""Which items make up which step, and reading them ahead of the step that needs them.

A batch shares one bucket: its size, and the sizes of its references. What step n trains on is a function of (seed, n)
and the set alone: no position is kept, so a resumed run goes on with the very batch that the unbroken one would have
had.

Letters: B batch, L image tokens, R reference tokens, T text rows, C context channels.
"""

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import mlx.core as mx

from flux2_relay.cache import Store
from flux2_relay.cache.errors import InputError
from flux2_relay.stages.train import randomness
from flux2_relay.stages.train.contexts import Contexts, Stored, reference_ids, stored, tokens, typed
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.transformer import image_ids, text_ids

_THREADS, _AHEAD = 4, 2

Size = tuple[int, int]
"""Rows and columns in tokens."""


@dataclass(frozen=True, slots=True)
class Item:
    """One picture in one bucket, with the captions that it may be shown with."""

    id: str
    latents: str  # key
    size: Size
    captions: tuple[str, ...]  # keys
    references: tuple[tuple[str, Size], ...] = ()  # key and size of each
    mask: str | None = None  # key
    prior: bool = False

    @property
    def bucket(self) -> tuple[Size, ...]:
        """What all items of a batch have in common: their size, then those of their references."""
        return (self.size, *(size for _, size in self.references))


@dataclass(frozen=True, slots=True)
class Draw:
    """One item of one step: its place in the step's whole batch decides its noise, sigma and caption."""

    place: int
    item: Item
    caption: str  # key


class Batches:
    """The order of training: `at(step)` gives the draws of every forward pass of a step, over all ranks."""

    def __init__(self, body: Mapping[str, object], options: TrainOptions, seed: int, ranks: int = 1) -> None:
        """From a set's body; InputError where it holds nothing to train on."""
        self._options, self._seed, self._passes = options, seed, options.accumulate * ranks
        self._empty = body["shared"]["empty"]  # pyright: ignore[reportIndexIssue]
        self._orders: dict[tuple[int, str, int], list[int]] = {}
        self._buckets: dict[tuple[Size, ...], list[Item]] = {}
        for item in items(body):
            self._buckets.setdefault(item.bucket, []).append(item)
        if not self._buckets:
            raise InputError("the set holds no pictures; give the config a `data` section and run `relay encode`")
        self._sorted = sorted(self._buckets.items(), key=lambda named: named[0])
        counts = (-(-len(items) // options.batch) for _, items in self._sorted)
        self._starts = list(accumulate(counts, initial=0))  # of each bucket's passes among those of an epoch

    @property
    def prior_weight(self) -> float:
        """What the loss of prior pictures is multiplied by."""
        return self._options.prior_weight

    def at(self, step: int) -> list[list[Draw]]:
        """The forward passes of step `step` (from 0): `accumulate` a rank, each of `batch` draws of one bucket."""
        batch, passes = self._options.batch, self._passes
        return [
            [self._draw(step, n * batch + i, item) for i, item in enumerate(self._pass(step * passes + n))]
            for n in range(passes)
        ]

    def _draw(self, step: int, place: int, item: Item) -> Draw:
        if randomness.uniform(self._seed, "dropout", step, place) < self._options.caption_dropout:
            return Draw(place, item, self._empty)
        choice = randomness.number(self._seed, "caption", step, place) % len(item.captions)
        return Draw(place, item, item.captions[choice])

    def _pass(self, number: int) -> list[Item]:
        """The items of forward pass `number` of the run: an epoch is all batches of all buckets, shuffled."""
        epoch, position = divmod(number, self._starts[-1])
        place = self._order(self._starts[-1], "passes", epoch)[position]
        of = bisect_right(self._starts, place) - 1
        (name, bucket), n = self._sorted[of], place - self._starts[of]
        order = self._order(len(bucket), "items " + " ".join(map(str, name)), epoch)
        # The last batch of a bucket is filled from its beginning: every pass weighs the same.
        return [bucket[order[(n * self._options.batch + i) % len(order)]] for i in range(self._options.batch)]

    def _order(self, count: int, what: str, epoch: int) -> list[int]:
        key = (count, what, epoch)
        if key not in self._orders:
            if len(self._orders) > 2 * (len(self._buckets) + 1):  # orders of past epochs are not needed again
                self._orders.clear()
            self._orders[key] = randomness.shuffled(count, self._seed, what, epoch)
        return self._orders[key]


def items(body: Mapping[str, object]) -> Iterator[Item]:
    """Every picture of a set, in every bucket it was encoded for, as often as its `repeats` says."""
    samples = body["samples"]
    assert isinstance(samples, Sequence)
    for sample in samples:
        for latents in sample["latents"]:
            item = Item(
                sample["id"],
                latents["key"],
                (latents["h"], latents["w"]),
                tuple(sample["text"]),
                _references(latents),
                latents["mask"],
                sample["prior"],
            )
            yield from [item] * sample["repeats"]


def _references(latents: Mapping[str, Any]) -> tuple[tuple[str, Size], ...]:
    """Key and size of each reference; sets without any say nothing of their sizes."""
    sizes = latents.get("reference_sizes", ())
    return tuple((key, (h, w)) for key, (h, w) in zip(latents["references"], sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Loaded:
    """The batches of one step, the draws they came from, and how long the step waited for them."""

    step: int
    passes: list[tuple[list[Draw], Batch]]
    wait_seconds: float
    whole: Sequence[list[Draw]] = ()
    """The draws of the step's passes at all ranks."""


Steps = Generator[Loaded, None, None]
"""Loaded steps in order; to be closed where not all are taken."""


class Order(Protocol):
    """Says which items make up which step."""

    @property
    def prior_weight(self) -> float:
        """What the loss of prior pictures is multiplied by."""
        ...

    def at(self, step: int) -> list[list[Draw]]:
        """The forward passes of a step."""
        ...


_ALL = slice(None)


def load_ahead(batches: Order, store: Store, contexts: Contexts, first: int, last: int, share: slice = _ALL) -> Steps:
    """The steps `first` … `last` - 1 in order, of each the passes in `share`; entries are read two steps ahead.

    Threads read them and carry them into MLX's memory, so that a step finds its arrays ready and has only to name what
    is to be computed of them. What goes wrong in a thread is raised here, in the step that needs the entry.
    """
    waiting: deque[tuple[list[list[Draw]], list[list[_Read]]]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="reader") as pool:

        def fetch(kind: str, key: str) -> Future[Stored]:
            return pool.submit(lambda: stored(store.read(kind, key)))

        def read(draw: Draw) -> _Read:
            item = draw.item
            return _Read(
                draw,
                fetch("latents", item.latents),
                fetch("text", draw.caption),
                [fetch("latents", key) for key, _ in item.references],
                fetch("masks", item.mask) if item.mask else None,
            )

        def submit(step: int) -> None:
            if step < last:
                whole = batches.at(step)
                waiting.append((whole, [[read(draw) for draw in draws] for draws in whole[share]]))

        try:
            for step in range(first, first + _AHEAD):
                submit(step)
            for step in range(first, last):
                started = time.perf_counter()
                whole, reading = waiting.popleft()
                passes = [_batch(reads, contexts, batches.prior_weight) for reads in reading]
                submit(step + _AHEAD)  # only now: threads that begin to read would delay the batch that is ready
                yield Loaded(step, passes, time.perf_counter() - started, whole)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Read:
    """The entries of one draw, on their way."""

    draw: Draw
    latents: Future[Stored]
    text: Future[Stored]
    references: list[Future[Stored]]
    mask: Future[Stored] | None


def _batch(reads: list[_Read], contexts: Contexts, prior_weight: float) -> tuple[list[Draw], Batch]:
    draws = [read.draw for read in reads]
    first = draws[0].item
    weights = [prior_weight if draw.item.prior else 1.0 for draw in draws]
    return draws, Batch(
        latents=mx.stack([tokens(read.latents.result()) for read in reads]),
        context=mx.stack([contexts.whole(read.text.result()) for read in reads]),
        latent_ids=image_ids(*first.size),
        text_ids=text_ids(contexts.length),
        references=mx.stack([_joined(read) for read in reads]) if first.references else None,
        reference_ids=reference_ids([size for _, size in first.references]) if first.references else None,
        mask=mx.stack([_mask(read) for read in reads]) if any(read.mask for read in reads) else None,
        item_weight=mx.array(weights, mx.float32) if set(weights) != {1.0} else None,
    )


def _joined(read: _Read) -> mx.array:
    return mx.concatenate([tokens(reference.result()) for reference in read.references])


def _mask(read: _Read) -> mx.array:
    """The mask [L] of an item; one without trains all its rows."""
    if read.mask is None:
        return mx.ones(read.draw.item.size[0] * read.draw.item.size[1])
    return typed(read.mask.result()).reshape(-1).astype(mx.float32)
