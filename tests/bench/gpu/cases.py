"""The rows of the table: what each case runs, what is asked of it, and how long it takes on an H200.

The most telling come first. Plain data: neither MLX nor torch is imported here, so that the parent process holds no
memory of the card.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

GIB = 2**30
ALL = -1
"""Every block, of `keep` and `resident`."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a case should reach; None asks nothing."""

    seconds: float | None = None
    gib: float | None = None
    faster_than: Mapping[str, float] = field(default_factory=dict)
    """Other case -> its seconds over ours, at least."""
    slower_at_most: Mapping[str, float] = field(default_factory=dict)
    """Other case -> our seconds over its, at most."""
    ratio: float | None = None
    """Greatest value of what a case of another kind reports as `ratio`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    name: str
    kind: str
    """Which module of this folder runs it: `run(case, settings)`."""
    settings: Mapping[str, Any]
    goal: Goal = Goal()
    expected_seconds: float
    """Of the whole process on an H200, for planning."""
    files: str = ""
    """Folder of weights on disk that it shares with other cases; removed after the last of them."""


def step(name: str, model: str, pixels: tuple[int, int], goal: Goal, expected: float, **settings: Any) -> Case:
    """A training step of ours."""
    files = f"blocks-{model}-{settings['bits']}" if settings.get("resident", ALL) != ALL else ""
    chosen = {"model": model, "pixels": pixels, **settings}
    return Case(name=name, kind="steps", settings=chosen, goal=goal, expected_seconds=expected, files=files)


def peer(name: str, model: str, pixels: tuple[int, int], checkpointed: bool, expected: float) -> Case:
    """The same step with diffusers and peft."""
    chosen = {"model": model, "pixels": pixels, "checkpointed": checkpointed, "steps": 5}
    return Case(name=name, kind="peer_steps", settings=chosen, expected_seconds=expected)


SMALL, LARGE = (512, 512), (1024, 1024)


def kernels() -> Iterator[Case]:
    """Our own kernels against the portable forms; `ratio` is 1 where they are equal."""
    yield Case(name="kernels", kind="own_kernels", settings={}, goal=Goal(ratio=1.0), expected_seconds=15)


def resident() -> Iterator[Case]:
    """All weights in memory, bfloat16, beside the peer."""
    for pixels, side, seconds, gib, lean, expected in (
        (SMALL, 512, 0.38, 75, 66, 20),
        (LARGE, 1024, 1.28, 100, 75, 25),
    ):
        against = {f"peer-dev-{side}-checkpointed": 1.6, f"peer-dev-{side}": 1.1}
        goal = Goal(seconds=seconds, gib=gib, faster_than=against)
        yield step(f"dev-bf16-{side}", "dev", pixels, goal, expected, bits=16, keep=ALL)
        yield peer(f"peer-dev-{side}-checkpointed", "dev", pixels, True, expected + 10)
        yield peer(f"peer-dev-{side}", "dev", pixels, False, expected + 5)
        yield step(f"dev-bf16-{side}-recompute", "dev", pixels, Goal(gib=lean), expected, bits=16, keep=0)


def quantized() -> Iterator[Case]:
    """All weights in memory, 4 and 8 bit, everything recomputed."""
    for bits, pixels, side, seconds, gib in ((4, SMALL, 512, 0.56, 22), (4, LARGE, 1024, 1.65, 25.5)):
        goal = Goal(seconds=seconds, gib=gib)
        yield step(f"dev-4bit-{side}", "dev", pixels, goal, 25, bits=bits, keep=0)
    for pixels, side, gib in ((SMALL, 512, 37), (LARGE, 1024, 40)):
        goal = Goal(gib=gib, slower_at_most={f"dev-bf16-{side}-recompute": 1.2})
        yield step(f"dev-8bit-{side}", "dev", pixels, goal, 25, bits=8, keep=0)


def klein() -> Iterator[Case]:
    """The small models, beside the peer."""
    for model, expected in (("klein-9b", 18), ("klein-4b", 16)):
        goal = Goal(faster_than={f"peer-{model}-1024-checkpointed": 1.6})
        yield step(f"{model}-bf16-1024", model, LARGE, goal, expected, bits=16, keep=ALL)
        yield peer(f"peer-{model}-1024-checkpointed", model, LARGE, True, expected)
        yield peer(f"peer-{model}-1024", model, LARGE, False, expected)


def streamed() -> Iterator[Case]:
    """4 bit read from disk in each step: with one piece in flight, as usual, and with half of the blocks resident."""
    few = {"bits": 4, "keep": 0, "warm_up": 1, "steps": 2}
    yield step("dev-4bit-least-512", "dev", SMALL, Goal(gib=5), 70, resident=0, ahead=1, **few)
    yield step("dev-4bit-least-1024", "dev", LARGE, Goal(gib=8.5), 60, resident=0, ahead=1, **few)
    yield step("dev-4bit-streamed-512", "dev", SMALL, Goal(ratio=1.3), 50, resident=0, **few)
    yield step("dev-4bit-half-512", "dev", SMALL, Goal(ratio=1.3), 40, resident=28, **few)


def budgets() -> Iterator[Case]:
    """What the plan makes of `memory.budget`."""
    for gib, bits, expected in ((80, 16, 20), (40, 8, 25), (24, 4, 25), (16, 4, 40), (10, 4, 50), (6, 4, 60)):
        chosen = {"model": "dev", "pixels": SMALL, "budget_gib": gib, "warm_up": 1, "steps": 2}
        goal, files = Goal(gib=gib), f"blocks-dev-{bits}" if gib < 24 else ""
        name = f"dev-budget-{gib}"
        yield Case(name=name, kind="steps", settings=chosen, goal=goal, expected_seconds=expected, files=files)


def buckets() -> Iterator[Case]:
    """Rows that no 128 divides, and the next multiple: 512 + 3952 and 512 + 3968."""
    yield step("dev-4bit-992x1024", "dev", (992, 1024), Goal(), 25, bits=4, keep=0, steps=5)
    goal = Goal(slower_at_most={"dev-4bit-992x1024": 1.15})
    yield step("dev-4bit-832x1216", "dev", (832, 1216), goal, 30, bits=4, keep=0, steps=5)


def encoders() -> Iterator[Case]:
    """Stage one at dev's size, 1,000 captions of about 60 tokens, and transformers, padded."""
    for name, goal, is_streamed, expected in (
        ("dev-encoder", Goal(seconds=5, faster_than={"peer-dev-encoder": 1.0}), False, 30),
        ("dev-encoder-streamed", Goal(gib=7.5, faster_than={"peer-dev-encoder": 1.0}), True, 45),
    ):
        chosen = {"captions": 1000, "mean": 60, "streamed": is_streamed, "repeats": 2}
        files = "encoder" if is_streamed else ""
        yield Case(name=name, kind="encoder", settings=chosen, goal=goal, expected_seconds=expected, files=files)
    chosen = {"captions": 1000, "batch": 8, "measured": 64}
    yield Case(name="peer-dev-encoder", kind="peer_encoder", settings=chosen, expected_seconds=40)


def others() -> Iterator[Case]:
    """Numbers at size, and a long run."""
    chosen = {"model": "dev", "pixels": SMALL}
    goal = Goal(ratio=1.5)
    yield Case(name="dev-at-size", kind="at_size", settings=chosen, goal=goal, expected_seconds=60, files="at-size")
    settings = {"model": "klein-4b", "pixels": SMALL, "bits": 16, "keep": ALL, "warm_up": 20, "steps": 280}
    yield Case(name="klein-4b-300-steps", kind="long", settings=settings, goal=Goal(ratio=1.05), expected_seconds=45)


def variants() -> Iterator[Case]:
    """The same step with one thing changed: what a decision of the code is worth."""
    common: dict[str, Any] = {"bits": 16, "keep": ALL, "steps": 6}
    yield step("dev-bf16-512-blocks", "dev", SMALL, Goal(), 20, targets="blocks", **common)
    for ahead in (1, 2, 6, 12):
        yield step(f"dev-bf16-512-ahead-{ahead}", "dev", SMALL, Goal(), 15, ahead=ahead, **common)
    yield step("dev-bf16-512-cached", "dev", SMALL, Goal(), 15, cache_gib=32, **common)
    yield step("klein-4b-bf16-512", "klein-4b", SMALL, Goal(), 12, **common)
    yield step("klein-4b-bf16-512-ahead-8", "klein-4b", SMALL, Goal(), 12, ahead=8, **common)
    yield step("dev-4bit-512-portable", "dev", SMALL, Goal(), 25, bits=4, keep=0, steps=6, portable=True)
    yield step("dev-8bit-512-portable", "dev", SMALL, Goal(), 25, bits=8, keep=0, steps=6, portable=True)
    yield step("dev-4bit-832x1216-portable", "dev", (832, 1216), Goal(), 35, bits=4, keep=0, steps=3, portable=True)
    for bits, gib in ((4, 25.5), (8, 40)):  # with a piece less in flight
        name = f"dev-{bits}bit-1024-ahead-2"
        yield step(name, "dev", LARGE, Goal(gib=gib), 25, bits=bits, keep=0, ahead=2, steps=5)
    yield step("dev-4bit-512-kept", "dev", SMALL, Goal(), 18, bits=4, keep=ALL, steps=6)


def pieces() -> Iterator[Case]:
    """Where a step's time goes."""
    for name, bits, keep, pixels in (
        ("dev-bf16-512-pieces", 16, ALL, SMALL),
        ("dev-4bit-512-pieces", 4, 0, SMALL),
        ("dev-bf16-1024-pieces", 16, ALL, LARGE),
    ):
        chosen = {"model": "dev", "pixels": pixels, "bits": bits, "keep": keep}
        yield Case(name=name, kind="by_piece", settings=chosen, expected_seconds=25)


def parallel() -> Iterator[Case]:
    """Two ranks, a card each, over NCCL: against one rank, against the peer, the same adapter, and a lost rank.

    1.9 x the items a second is a step of 2 / 1.9 of the time.
    """
    for model, side, pixels in (
        ("klein-4b", 512, SMALL),
        ("klein-4b", 1024, LARGE),
        ("klein-9b", 512, SMALL),
        ("klein-9b", 1024, LARGE),
    ):
        chosen = {"model": model, "pixels": pixels, "bits": 16, "keep": ALL, "ranks": 2, "measure": "speed"}
        name, against = f"{model}-{side}-two-ranks", f"peer-{model}-{side}-two-ranks"
        goal = Goal(ratio=2 / 1.9, faster_than={against: 1.0})
        yield Case(name=name, kind="parallel", settings=chosen, goal=goal, expected_seconds=50)
        few = {"model": model, "pixels": pixels, "ranks": 2, "steps": 5}
        yield Case(name=against, kind="peer_parallel", settings=few, expected_seconds=70)
    common = {"model": "klein-4b", "pixels": SMALL, "bits": 16, "keep": ALL, "ranks": 2, "warm_up": 1}
    chosen = {**common, "measure": "same", "steps": 20}
    yield Case(name="two-ranks-same", kind="parallel", settings=chosen, goal=Goal(ratio=0.05), expected_seconds=60)
    chosen = {**common, "measure": "killed"}
    yield Case(name="two-ranks-killed", kind="parallel", settings=chosen, goal=Goal(seconds=30), expected_seconds=60)


def sweeps() -> Iterator[Case]:
    """Four runs over one base in one pass; `ratio` is its time over that of four steps of one run."""
    common: dict[str, Any] = {"model": "dev", "pixels": SMALL, "runs": 4, "keep": 0}
    for name, ratio, expected, settings in (
        ("dev-4bit-512-sweep", 0.87, 60, {"bits": 4, "warm_up": 2, "steps": 5}),
        ("dev-bf16-512-sweep", 1.0, 50, {"bits": 16, "warm_up": 2, "steps": 5}),
        ("dev-4bit-512-sweep-streamed", 0.33, 120, {"bits": 4, "resident": 0, "warm_up": 1, "steps": 2}),
    ):
        files = "blocks-dev-4" if "resident" in settings else ""
        yield Case(
            name=name,
            kind="sweeps",
            settings={**common, **settings},
            goal=Goal(ratio=ratio),
            expected_seconds=expected,
            files=files,
        )


CASES: Mapping[str, Case] = {
    case.name: case
    for group in (
        *(kernels, resident, quantized, klein, others, buckets, encoders, streamed, budgets, variants, pieces),
        *(parallel, sweeps),
    )
    for case in group()
}


def tiny(case: Case) -> Case:
    """The same case on a model that a CPU runs in a second, all else as it is."""
    settings = {**case.settings, "tiny": True}
    settings["pixels"] = tuple(side // 16 // 8 * 16 for side in case.settings.get("pixels", SMALL))
    settings |= {"steps": min(2, case.settings.get("steps", 2)), "warm_up": 1}
    if case.kind == "long":
        settings |= {"warm_up": 2, "steps": 6}
    settings |= {name: 12 for name in ("captions", "measured") if name in case.settings}
    if case.settings.get("resident", ALL) > 0:
        settings["resident"] = 1
    return replace(case, settings=settings)
