"""Several trainings over one base: at each step one pass through the blocks carries the next step of every run.

Each run is what it is alone: its adapters, order, noise, optimizer, folder and checkpoints depend on no other, and its
products are the same products. What is shared is the base: a block is read and made dense once for all of them. A run
that ends, or that fails, leaves the pass; the others go on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from tqdm import tqdm

from flux2_relay.cache.errors import RelayError
from flux2_relay.stages import memory
from flux2_relay.stages.device_errors import in_plain_words
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.measure import in_words, peak_bytes
from flux2_relay.stages.one_model import in_turn
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import base, layout, loop
from flux2_relay.stages.train.batches import Loaded, Steps, load_ahead
from flux2_relay.stages.train.job import Job, Journal
from flux2_relay.stages.train.layout import Layout
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.shared_base import shared
from flux2_relay.stages.train.step import Asked, Found, gradients_together
from flux2_relay.stages.train.transformer import Transformer, stock_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A run that is to be trained beside others."""

    name: str
    job: Job
    journal: Journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a run ended: steps done, and what went wrong, if anything did."""

    done: int
    fault: str | None = None


def run(entries: Sequence[Entry], folders: ModelFolders, spec: TransformerSpec, say: loop.Say) -> dict[str, Ended]:
    """Load the transformer, train all runs to their ends, and let go of it -> how each of them ended, by name.

    All jobs must agree in `memory` and in `train.dtype`. `say` hears what concerns all runs.
    """
    for entry in entries:
        loop.look_ahead(entry.job, spec, entry.journal)
    stored = stock_of(folders.transformer, spec)
    planned = layout_of([entry.job for entry in entries], spec, stored)
    say(f"memory for {len(entries)} runs together: {planned.in_words()}")
    return in_turn("transformer", partial(_load_and_train, entries, folders, spec, planned, say), say)


def layout_of(jobs: Sequence[Job], spec: TransformerSpec, stored: base.Stock | None = None) -> Layout:
    """How the trainings fit the memory budget together; InputError says how many of them would."""
    options = jobs[0].memory
    loads = [loop.load_of(job, spec, stored) for job in jobs]
    return layout.choose(spec, loads, options, memory.budget_bytes(options.budget))


def pace_of(spec: TransformerSpec, planned: Layout, trains: Sequence[TrainOptions]) -> dict[str, object]:
    """What seconds a step of all runs together depend on, for `figures`."""
    each = [layout.pace_of(spec, planned, train) for train in trains]
    together = [[of["batch"], of["accumulate"]] for of in each]
    return {**each[0], "together": together, "joined": planned.joined}


def _load_and_train(
    entries: Sequence[Entry], folders: ModelFolders, spec: TransformerSpec, planned: Layout, say: loop.Say
) -> dict[str, Ended]:
    transformer = loop.load(entries[0].job, folders, spec, planned, say)
    pace: list[float] = []
    try:
        for entry in {entry.job.record.key: entry for entry in entries}.values():
            loop.look_at_data(entry.job, transformer, entry.journal)
        ended = train(entries, transformer, pace)
    finally:
        transformer.residence.close()
    loop.note_pace(pace_of(spec, planned, [entry.job.train for entry in entries]), pace)
    say(f"memory: predicted peak {in_words(planned.peak_bytes)}, measured {in_words(peak_bytes())}")
    return ended


def train(entries: Sequence[Entry], transformer: Transformer, pace: list[float] | None = None) -> dict[str, Ended]:
    """Train all runs, each until it would end alone -> how each of them ended, by name.

    `pace` gets the seconds of each step that all of them took together.
    """
    loop.limit_cache(transformer)
    together = shared(transformer)
    runs = [_Going(entry, replace(together, adapters={})) for entry in entries]
    with in_plain_words(lambda: "No checkpoints were written of it: " + "; ".join(map(str, runs)) + "."):
        try:
            _steps(runs, [] if pace is None else pace)
        finally:
            for one in runs:
                one.leave()
    return {one.name: Ended(done=one.run.done, fault=one.fault) for one in runs}


def _steps(runs: Sequence["_Going"], pace: list[float]) -> None:
    for one in runs:
        one.begin()
    with tqdm(total=sum(one.left for one in runs), desc="train", unit="step", dynamic_ncols=True) as bar:
        while going := [one for one in runs if one.is_going]:
            bar.set_postfix(runs=len(going), refresh=False)
            started = time.perf_counter()
            _one_step([one for one in going if one.load()], bar.update)
            if len(going) == len(runs):
                pace.append(time.perf_counter() - started)


def _one_step(going: Sequence["_Going"], tick: Callable[[], object]) -> None:
    """One pass through the blocks with the next step of every run, then what each of them makes of it."""
    started = time.perf_counter()
    found = gradients_together([one.asked() for one in going]) if going else []
    seconds = time.perf_counter() - started
    for one in going:
        one.learn(found.pop(0), seconds)
        tick()


class _Going:
    """A run in the pass; what goes wrong in its own part ends it alone, and is told when all have ended."""

    def __init__(self, entry: Entry, transformer: Transformer) -> None:
        """Fresh adapters on `transformer`, and nothing done yet."""
        self.name, self.fault, self.is_going, self._last = entry.name, None, True, 0
        self.run, self._batches, self._contexts = loop.prepare(entry.job, transformer, entry.journal)
        self._loads: Steps | None = None
        self._loaded: Loaded | None = None

    def __str__(self) -> str:
        """What the next start does with it."""
        return f"{self.name}: {self.run.where_to_go_on()}"

    @property
    def left(self) -> int:
        """Steps to come."""
        return self._last - self.run.done

    def begin(self) -> None:
        """From the newest checkpoint, or from nothing."""
        job = self.run.job
        with self._own():
            first = self.run.begin()
            self._last = loop.last_step(job, first)
            self._loads = load_ahead(self._batches, job.store, self._contexts, first, self._last)
            self._end_if(not self.left)

    def load(self) -> bool:
        """Wait for the items of the next step -> whether they are there."""
        with self._own():
            assert self._loads is not None
            self._loaded = next(self._loads)
        return self.is_going

    def asked(self) -> Asked:
        """The next step."""
        assert self._loaded is not None
        return Asked(self.run.transformer, self._loaded, self.run.terms)

    def learn(self, found: Found, seconds: float) -> None:
        """The update from what was found in `seconds`, and what is due after it."""
        assert self._loaded is not None
        with self._own():
            self.run.learn(self._loaded, found, time.perf_counter() - seconds)
            self._end_if(loop.is_over(self.run) or not self.left)

    def leave(self) -> None:
        """Take no more part, and read no further."""
        self.is_going, self._loaded = False, None
        if self._loads is not None:
            self._loads.close()

    def _end_if(self, is_over: bool) -> None:
        if is_over:
            self.run.finish()
            self.run.journal.say(f"{self.run.done} of {self.run.job.train.steps} steps done")
            self.leave()

    @contextmanager
    def _own(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._fail(f"reading or writing failed: {error}. {self.run.where_to_go_on()}")
        except RelayError as error:
            self._fail(str(error))

    def _fail(self, fault: str) -> None:
        self.fault = fault
        self.run.journal.say(f"this run ends here, the others go on: {fault}")
        self.leave()
