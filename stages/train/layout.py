"""How training fits the memory budget: bits, blocks resident or streamed, what is kept, attention in chunks.

What each decision costs is in `step_work.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import memory
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import base, forward_work, step_work
from flux2_relay.stages.train.base import Stock
from flux2_relay.stages.train.batches import Item
from flux2_relay.stages.train.optimizer import moments
from flux2_relay.stages.train.options import MemoryOptions, PreviewOptions, TrainOptions
from flux2_relay.stages.train.step_work import (
    AHEAD,
    FEWER_PIECES,
    PREVIEWS,
    Load,
    has_fused_attention,
    heads_at_a_time,
    joinable,
    kept_bytes,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutOptions:
    """The sections of a config that a layout obeys."""

    train: TrainOptions
    memory: MemoryOptions
    previews: PreviewOptions = field(default_factory=PreviewOptions)
    dropout: float = 0.0  # `lora.dropout`
    kind: str = "lora"  # `lora.kind`


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The decisions, and the peak that they lead to."""

    bits: Literal[32, 16, 8, 6, 4]
    rows: int  # text and image tokens of the largest item
    resident: int  # blocks in memory
    blocks: int
    ahead: int  # blocks being read
    keep: int  # last blocks whose wide projections are kept
    heads: int  # heads at a time in attention's backward pass, 0 for all
    parts: Mapping[str, int]
    """Bytes by what they are for."""
    stored: str = ""  # how the checkpoint has packed most matrices, where they stay so
    pieces: int | None = None  # of blocks under way at once; None is the device's usual number
    joined: bool = False  # whether passes of several runs go through the blocks as one batch

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of live arrays."""
        return sum(self.parts.values())

    @property
    def streamed(self) -> bool:
        """Whether any block is read from disk at each step."""
        return self.resident < self.blocks

    def in_words(self) -> str:
        """The decisions and the prediction, in one sentence."""
        where = f"{self.resident} of {self.blocks} blocks resident" if self.streamed else "all blocks resident"
        chunks = f", attention {self.heads} heads at a time" if self.heads else ""
        chunks += f", {self.pieces} piece{'' if self.pieces == 1 else 's'} in flight" if self.pieces is not None else ""
        chunks += ", base products over all runs at once" if self.joined else ""
        kept = f"{self.keep} {'block keeps its' if self.keep == 1 else 'blocks keep their'}"
        parts = ", ".join(f"{name} {in_words(size)}" for name, size in self.parts.items() if size)
        return (
            f"{self.stored or f'{self.bits} bit'}, {where}, {kept} projections{chunks}; "
            f"predicted peak {in_words(self.peak_bytes)} ({parts})"
        )


def pace_of(spec: TransformerSpec, layout: Layout, train: TrainOptions) -> dict[str, object]:
    """What seconds a step depend on, for `figures`."""
    decided = {name: getattr(layout, name) for name in ("bits", "stored", "rows", "resident")}
    asked = {name: getattr(train, name) for name in ("batch", "accumulate", "dtype")}
    return {"transformer": asdict(spec), **decided, **asked}


def choose(spec: TransformerSpec, loads: Load | Sequence[Load], options: MemoryOptions, budget_bytes: int) -> Layout:
    """The fastest layout whose predicted peak stays under the budget, for one training or for several together.

    In this order: bfloat16 resident, 8 bit resident, 4 bit resident, 4 bit with as many blocks resident as fit, each
    with several runs taken in turns and then with fewer pieces in flight where that is what it takes; then what is left
    goes to kept projections. Explicit settings are obeyed. InputError says the smallest budget that works.
    """
    loads = [loads] if isinstance(loads, Load) else loads
    tried = [
        predict_together(spec, loads, bits, resident, pieces, joined)
        for bits, resident in _tries(spec, loads[0], options)
        for pieces in FEWER_PIECES[memory.is_gpu()]
        for joined in ((True, False) if joins_runs(loads) else (False,))
    ]
    found = next((layout for layout in tried if layout.peak_bytes <= budget_bytes), None)
    if found is None:
        least = min(tried, key=lambda layout: layout.peak_bytes)
        what = _of_what(spec, loads, options, budget_bytes)
        raise InputError(
            f"memory.budget: {in_words(budget_bytes)} is too little for {what}; the least that works with these "
            f"settings is {in_words(least.peak_bytes)} ({least.in_words()})"
        )
    return _with_kept(spec, loads, found, budget_bytes)


def fitting(spec: TransformerSpec, loads: Sequence[Load], options: MemoryOptions, budget_bytes: int) -> int:
    """How many of these trainings, the first ones, fit together at all."""
    tries = list(_tries(spec, loads[0], options))
    fewest = list(FEWER_PIECES[memory.is_gpu()])[-1]

    def fits(count: int) -> bool:
        found = (predict_together(spec, loads[:count], bits, resident, fewest) for bits, resident in tries)
        return any(layout.peak_bytes <= budget_bytes for layout in found)

    return next((count for count in range(len(loads), 0, -1) if fits(count)), 0)


def _of_what(spec: TransformerSpec, loads: Sequence[Load], options: MemoryOptions, budget_bytes: int) -> str:
    if len(loads) == 1:
        return "this model"
    fit = fitting(spec, loads, options, budget_bytes)
    return f"these {len(loads)} runs together, of which {fit or 'not even one'} would fit"


def layout_for(
    spec: TransformerSpec,
    items: Sequence[Item],
    text_rows: int,
    adapter: int,
    options: LayoutOptions,
    stored: Stock | None = None,
) -> Layout:
    """The layout for a data set: its largest item, an adapter of `adapter` weights, and what the config says.

    `stored` is what the checkpoint has packed already.
    """
    load = load_for(items, text_rows, adapter, options, stored)
    return choose(spec, load, options.memory, memory.budget_bytes(options.memory.budget))


def load_for(
    items: Sequence[Item], text_rows: int, adapter: int, options: LayoutOptions, stored: Stock | None = None
) -> Load:
    """What a pass over such a data set has to carry; arguments as of `layout_for`."""
    rows = text_rows + max(sum(height * width for height, width in item.bucket) for item in items)
    return Load(
        batch=options.train.batch,
        rows=rows,
        adapter_bytes=4 * adapter,
        adapter_copies=2 + moments(options.train) + (options.train.ema is not None),
        item_bytes=4 if options.train.dtype == "float32" else 2,
        fused_attention=has_fused_attention(rows),
        stored=stored or {},
        dropout=options.dropout > 0,
        kind=options.kind,
        drawn_rows=forward_work.preview_rows(options.previews, text_rows),
    )


def predict(
    spec: TransformerSpec,
    load: Load,
    bits: int,
    resident: int,
    keep: int = 0,
    pieces: int | None = None,
) -> Layout:
    """The layout of these decisions with its predicted peak."""
    return Layout(
        bits=bits,  # pyright: ignore[reportArgumentType] - one of the options' values
        rows=load.rows,
        resident=resident,
        blocks=spec.blocks,
        ahead=AHEAD,
        keep=keep,
        heads=heads_at_a_time(spec, load),
        parts=step_work.parts(spec, load, bits, resident, keep, pieces),
        stored=base.summary(load.stored, bits),
        pieces=pieces,
    )


def joins_runs(loads: Sequence[Load]) -> bool:
    """Whether passes of several runs are worth a batch of their own: on a GPU, where some of them can stand in one.

    On a CPU large products are no faster than small ones, and a run taken in turns keeps the bits that it has alone.
    """
    return memory.is_gpu() and any(len(group) > 1 for group in joinable(loads))


def predict_together(
    spec: TransformerSpec,
    loads: Sequence[Load],
    bits: int,
    resident: int,
    pieces: int | None = None,
    joined: bool = False,
) -> Layout:
    """The layout of these decisions for several trainings that share each block's weights (`shared_base.py`).

    `joined`: whether those that can go through a block as one batch (`beside.py`), else all of them in turns.
    """
    each = [predict(spec, load, bits, resident, pieces=pieces) for load in loads]
    if len(each) == 1:
        return each[0]
    parts = step_work.parts_together(spec, loads, bits, [one.parts for one in each], joined)
    heads = min((one.heads for one in each if one.heads), default=0)
    return replace(each[0], rows=max(one.rows for one in each), heads=heads, parts=parts, joined=joined)


def _tries(spec: TransformerSpec, load: Load, options: MemoryOptions) -> Iterator[tuple[int, int]]:
    """(bits, blocks resident) that may be chosen, the best first.

    All bits come before streaming, and what is streamed has the fewest: a block that is not held is read twice a step,
    so even at 4 bit a streamed base takes several times as long as one that is held. More memory is never slower.
    """
    every = (32 if load.item_bytes == 4 else 16, 8, 4) if options.bits == "auto" else (options.bits,)
    if options.stream != "always":
        yield from ((bits, spec.blocks) for bits in every)
    if options.stream != "never":
        most = 0 if options.stream == "always" else spec.blocks - 1
        yield from ((every[-1], resident) for resident in reversed(range(most + 1)))


def _with_kept(spec: TransformerSpec, loads: Sequence[Load], layout: Layout, budget_bytes: int) -> Layout:
    """The same layout with as many kept blocks as the budget has room for, the last ones first."""
    previews = layout.parts[PREVIEWS]  # what a step keeps has gone when they are drawn
    keep, kept, room = 0, 0, budget_bytes - layout.peak_bytes + previews
    for place in reversed(range(spec.blocks)):
        size = sum(kept_bytes(spec, load, place) for load in loads)
        if kept + size > room:
            break
        keep, kept = keep + 1, kept + size
    parts = {**layout.parts, "kept projections": kept, PREVIEWS: max(0, previews - kept)}
    return replace(layout, keep=keep, parts=parts)
