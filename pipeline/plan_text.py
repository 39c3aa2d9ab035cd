"""What a plan holds, and how it is told: labels, and plain sentences beside them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flux2_relay.pipeline import closing
from flux2_relay.pipeline.cache_commands import in_bytes
from flux2_relay.pipeline.labels import entry
from flux2_relay.pipeline.lacking import Entries
from flux2_relay.stages.encode.forecast import ImagePhase, TextPhase
from flux2_relay.stages.train.layout import Layout

_MOST = 6  # buckets and reasons that are listed
_NAMES = {"text": "captions", "latents": "pictures", "masks": "masks"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What there is to train on."""

    pictures: int
    captions: int
    buckets: tuple[tuple[int, int, int], ...]
    """(width, height, pictures), the fullest first."""
    remarks: tuple[str, ...]
    """What is cropped, small or otherwise worth a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """What stage one would do."""

    data: Data
    text_encoder: str | None
    """Identity of its weights, None while unknown."""
    to_hash_bytes: int
    """What `--hash` would read."""
    entries: Mapping[str, Entries]
    captions: TextPhase | None
    """None where no caption is missing for certain."""
    images: ImagePhase | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What stage two would do."""

    steps: int
    done: int
    pictures: int
    layout: Layout
    seconds: float | None
    """For the steps to come; None where nothing was measured on this machine."""
    disk_bytes: int
    """Checkpoints and adapters."""
    warnings: tuple[str, ...]
    """What a night may be lost on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One of several runs over one base."""

    folder: str
    steps: int
    done: int
    pictures: int
    own_bytes: int
    """Memory that it takes beside the others."""
    missing: int
    """Entries of its data that are not in the store."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """What stage two would do with several runs at once."""

    runs: tuple[Member, ...]
    layout: Layout
    room: int
    """More runs like the largest that would fit with the same layout, less what it keeps."""
    seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """One disk: what will be written to it, and what is free beyond a reserve."""

    places: tuple[str, ...]
    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that is told."""

    model: str
    store: str
    store_exists: bool
    budget_bytes: int
    encoding: Encoding | None
    """None where the model's encoders or the data are not on this machine, which training does not need."""
    training: Training | None
    together: Together | None = None
    """Instead of `training`, where there are several runs."""
    disks: tuple[Disk, ...]
    faults: tuple[str, ...]
    """What stands in the way."""


def write(plan: Plan) -> None:
    """Print it."""
    entry("model", plan.model)
    entry("store", plan.store + ("" if plan.store_exists else " (does not exist yet)"))
    if plan.encoding is not None:
        entry("data", *_data(plan.encoding))
        entry("entries", *_entries(plan.encoding))
        entry("encode", *_encode(plan.encoding))
    else:
        entry("encode", "cannot run on this machine, which lacks pictures or encoders; training needs neither")
    if plan.training is not None:
        entry("train", *_train(plan.training))
    if plan.together is not None:
        entry("runs", *map(_member, plan.together.runs))
        entry("train", *_together(plan.together))
    entry("memory", f"{in_bytes(plan.budget_bytes)} is the budget of each stage")
    entry("disk", *map(_disk, plan.disks))
    entry("next", _next(plan))


def _data(encoding: Encoding) -> Iterator[str]:
    data = encoding.data
    yield f"{_count(data.pictures, 'picture')} with {_count(data.captions, 'caption')}"
    for width, height, count in data.buckets[:_MOST]:
        yield f"  {width} x {height}: {count}"
    if len(data.buckets) > _MOST:
        rest = sum(count for _, _, count in data.buckets[_MOST:])
        yield f"  {len(data.buckets) - _MOST} more buckets: {rest}"
    yield from data.remarks


def _entries(encoding: Encoding) -> Iterator[str]:
    for kind, entries in encoding.entries.items():
        yield f"{_NAMES[kind]}: {_status(entries)}"
        for reason, count in list(entries.stale.items())[:_MOST]:
            yield f"  {count} stale: {reason}"
    if encoding.text_encoder is None:
        yield (
            f"the text encoder's identity is unknown: its {in_bytes(encoding.to_hash_bytes)} were never hashed on this "
            "machine. encode will do it; `relay plan --hash` does it now"
        )


def _status(entries: Entries) -> str:
    parts = [f"{entries.present} present"] if entries.present or not entries.unknown else []
    if entries.unknown:
        parts.append(f"{entries.unknown} of unknown identity")
        if entries.likely:
            parts.append(f"{entries.likely} of them there for some text encoder")
    else:
        parts.append(f"{len(entries.missing)} missing")
    return f"{entries.wanted} wanted, " + ", ".join(parts)


def _encode(encoding: Encoding) -> Iterator[str]:
    if encoding.captions is not None:
        of = encoding.captions
        how = "in one pass" if of.passes <= 1 else f"in {of.passes} passes"
        lasts = "" if of.seconds is None else f" and {_time(of.seconds / of.passes)}"
        each = f", {_count(of.captions_a_pass, 'caption')}{lasts} each: what a kill can lose at most"
        loses = each if of.passes > 1 else ""
        yield (
            f"text encoder: {_count(of.captions, 'caption')}, {of.tokens} tokens, {how}{loses}; {of.layout}; "
            f"predicted peak {in_bytes(of.peak_bytes)}; {_time(of.seconds)}"
        )
    if encoding.images is not None:
        of = encoding.images
        how = "whole" if of.strip_rows is None else f"in strips of {of.strip_rows} rows"
        yield (
            f"VAE: {_count(of.pictures, 'picture')}, {how}; predicted peak {in_bytes(of.peak_bytes)}; "
            f"{_time(of.seconds)}"
        )
    if encoding.captions is None and encoding.images is None:
        yield "nothing to encode" + (" as far as can be told" if encoding.text_encoder is None else "")


def _train(training: Training) -> Iterator[str]:
    done = f", {training.done} are done" if training.done else ""
    time = f"; {_time(training.seconds)}" if training.done < training.steps else ""
    yield f"{training.steps} steps{done}, on {_count(training.pictures, 'picture')}{time}"
    yield training.layout.in_words()
    for sentence in training.warnings:
        yield f"warning: {sentence}"


def _member(run: Member) -> str:
    done = f", {run.done} are done" if run.done else ""
    missing = f"; {run.missing} entries are missing" if run.missing else ""
    return (
        f"{run.folder}: {run.steps} steps{done}, on {_count(run.pictures, 'picture')}; {in_bytes(run.own_bytes)} of "
        f"memory for itself{missing}"
    )


def _together(together: Together) -> Iterator[str]:
    left = max(run.steps - run.done for run in together.runs)
    yield f"{len(together.runs)} runs together, {left} steps to the end of the longest; {_time(together.seconds)}"
    yield together.layout.in_words()
    yield f"{_count(together.room, 'more run')} like the largest would fit"
    for run in together.runs:
        yield from (f"warning: {run.folder}: {sentence}" for sentence in run.warnings)


def _disk(disk: Disk) -> str:
    verdict = "" if disk.needed_bytes <= disk.free_bytes else ": NOT ENOUGH"
    return (
        f"about {in_bytes(disk.needed_bytes)} more for {' and '.join(disk.places)}; "
        f"{in_bytes(disk.free_bytes)} are free beyond a reserve of 1 GiB{verdict}"
    )


def _next(plan: Plan) -> str:
    encoding = plan.encoding
    if plan.faults:
        return "see below"
    if encoding is not None and any(entries.missing or entries.unknown for entries in encoding.entries.values()):
        return closing.same_config("encode")
    of_runs = plan.together.runs if plan.together is not None else (plan.training,) if plan.training is not None else ()
    if any(isinstance(run, Member) and run.missing for run in of_runs):
        return closing.same_config("encode")
    if of_runs and all(run.done >= run.steps for run in of_runs):
        return "nothing is left to do"
    return closing.same_config("train")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "its time is not known before the first run on this machine"
    return f"about {in_time(seconds)}"


def in_time(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
