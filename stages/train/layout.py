"""How training fits the memory budget: bits, blocks resident or streamed, what is kept, attention in chunks.

A model of the peak, not a trial: the plan must know it before a weight is read. Its constants were read off the pieces
of `backward.py` (docs/performance.md says how), and the run prints the prediction beside what it measured.

Letters: R rows of a step's pass (batch times text and image tokens), D hidden, M MLP width, N heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Literal

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import memory
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.quantize import QUANTIZED_BITS
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import base, forward_work
from flux2_relay.stages.train.base import Stock
from flux2_relay.stages.train.batches import Item
from flux2_relay.stages.train.optimizer import moments
from flux2_relay.stages.train.options import MemoryOptions, PreviewOptions, TrainOptions
from flux2_relay.stages.train.residence import resident_places
from flux2_relay.stages.train.transformer import block_path, block_shapes, outer_shapes

_ON_CPU, _ON_GPU = ((57, 2.5), (36, 4.2)), ((51, 2.5),)
"""What a block's backward pass holds beside inputs and kept tensors at the moments when that is most: arrays of
[R, D], and dense copies of the largest matrix where weights are kept in another form than they are used."""
_ATTENTION_UNITS, _SCORES = 35, 4
"""Where attention is not fused: units beside the scores, and arrays as large as the scores of a chunk."""
_AHEAD = 1
"""Blocks being read while another is worked on."""
_PACKING_BYTES = 2
"""A weight of a matrix that is packed while its block is read, as the file has it."""
_MASK_BYTES = 5
"""An element of an adapter's input under dropout: random bits and the mask made of them."""
_KIND_UNITS: Mapping[str, int] = {"lora": 0, "dora": 24, "lokr": 32}
"""Units besides, by `lora.kind`: DoRA computes outputs once more and scales cotangents, LoKr joins those in pieces."""
_FEWER_PIECES = {True: {3: (0, 0.0), 2: (1, 1.0), 1: (2, 1.6)}, False: {1: (0, 0.0), 0: (11, 1.0)}}
"""On a GPU and not: pieces under way, the most first -> arrays and dense copies that this saves."""
_UNPACKING = 2.5
"""What making a packed matrix dense takes beside the result, in matrices, where it is not one kernel: on a CPU."""
_OPTIMIZER_COPIES = 3
"""Adapter-sized arrays that an update makes beside those that stay."""
_PREVIEWS = "larger previews"


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one forward pass has to carry."""

    batch: int
    rows: int  # text and image tokens of one item, the largest of the data set
    adapter_bytes: int  # A and B of all modules, float32
    adapter_copies: int  # of them that stay: parameters, gradients, moments, running mean
    item_bytes: int  # of the compute type
    fused_attention: bool  # whether the backend has a kernel for attention's gradient
    stored: Stock = field(default_factory=dict)  # what the checkpoint has packed already
    dropout: bool = False  # whether adapters leave out part of their input
    kind: str = "lora"  # `lora.kind`
    drawn_rows: int = 0  # text and image tokens of the largest preview


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
        for pieces in _FEWER_PIECES[memory.is_gpu()]
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
    fewest = list(_FEWER_PIECES[memory.is_gpu()])[-1]

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
    unit, heads = stream_bytes(spec, load), heads_at_a_time(spec, load)
    sizes = [block_bytes(spec, place, bits, load.stored) for place in range(spec.blocks)]
    weights = base.held_bytes(outer_shapes(spec), bits, load.stored)
    weights += sum(sizes[place] for place in resident_places(spec.blocks, resident))
    work, dense = _work_bytes(spec, load, bits, heads or spec.heads, pieces)
    parts = {
        "weights": weights,
        # The most is held in the first single block: itself and, being read, double ones. On a GPU pieces under way
        # may still need the block before.
        "blocks on their way": 0
        if resident == spec.blocks
        else sizes[-1] * (2 if memory.is_gpu() else 1) + _AHEAD * (max(sizes) + _packing_bytes(spec, load, bits)),
        "dense copies": dense,
        "adapter, gradients, moments": load.adapter_copies * load.adapter_bytes,
        "block inputs": spec.blocks * unit,
        "kept projections": sum(kept_bytes(spec, load, place) for place in range(spec.blocks - keep, spec.blocks)),
        "one block's work": max(work, _OPTIMIZER_COPIES * load.adapter_bytes - spec.blocks * unit),
    }
    parts[_PREVIEWS] = _beyond_steps(spec, [load], parts)
    return Layout(
        bits=bits,  # pyright: ignore[reportArgumentType] - one of the options' values
        rows=load.rows,
        resident=resident,
        blocks=spec.blocks,
        ahead=_AHEAD,
        keep=keep,
        heads=heads,
        parts=parts,
        stored=base.summary(load.stored, bits),
        pieces=pieces,
    )


def joins_runs(loads: Sequence[Load]) -> bool:
    """Whether passes of several runs are worth a batch of their own: on a GPU, where some of them can stand in one.

    On a CPU large products are no faster than small ones, and a run taken in turns keeps the bits that it has alone.
    """
    return memory.is_gpu() and any(len(group) > 1 for group in _joinable(loads))


def _joinable(loads: Sequence[Load]) -> list[list[int]]:
    """Which of the trainings can stand in one batch: those of plain LoRA without dropout, and of one batch size."""
    groups: dict[object, list[int]] = {}
    for place, load in enumerate(loads):
        joins = load.kind == "lora" and not load.dropout
        groups.setdefault(("batches of", load.batch) if joins else place, []).append(place)
    return list(groups.values())


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
    parts = dict(each[0].parts)  # weights, and blocks on their way, are there once
    for name in ("adapter, gradients, moments", "block inputs", "kept projections"):
        parts[name] = sum(one.parts[name] for one in each)
    streams, works = [stream_bytes(spec, load) for load in loads], [one.parts["one block's work"] for one in each]
    groups = _joinable(loads) if joined else [[place] for place in range(len(loads))]
    parts["one block's work"] = max(  # the others wait with their streams
        sum(works[place] if place in group else streams[place] for place in range(len(loads))) for group in groups
    )
    parts["dense copies"] = _dense_block_bytes(spec, loads[0], bits) if _is_made_dense(loads[0], bits) else 0
    parts[_PREVIEWS] = _beyond_steps(spec, loads, parts)
    heads = min((one.heads for one in each if one.heads), default=0)
    return replace(each[0], rows=max(one.rows for one in each), heads=heads, parts=parts, joined=joined)


def _beyond_steps(spec: TransformerSpec, loads: Sequence[Load], parts: Mapping[str, int]) -> int:
    """What the largest preview takes beyond a step, whose inputs and kept tensors are gone by then."""
    drawn = max(forward_work.work_bytes(spec, load.drawn_rows, load.item_bytes) for load in loads)
    return max(0, drawn - sum(parts[name] for name in ("block inputs", "kept projections", "one block's work")))


def own_bytes(spec: TransformerSpec, load: Load) -> int:
    """What a training takes for itself beside others over one base: adapters and what belongs to them, block inputs."""
    return load.adapter_copies * load.adapter_bytes + (spec.blocks + 1) * stream_bytes(spec, load)


def stream_bytes(spec: TransformerSpec, load: Load) -> int:
    """The rows of a pass, as wide as the blocks."""
    return load.batch * load.rows * spec.hidden * load.item_bytes


def heads_at_a_time(spec: TransformerSpec, load: Load) -> int:
    """Heads that attention's backward pass takes at once, 0 for all of them."""
    heads = spec.heads if load.fused_attention else max(1, min(spec.heads, 4 * spec.hidden // load.rows))
    return 0 if heads == spec.heads else heads


def _dense_block_bytes(spec: TransformerSpec, load: Load, bits: int) -> int:
    """Dense copies of a block's matrices, which several trainings share, while the last of them is made.

    On a GPU those of the block before may still be needed.
    """
    is_packed = bits in QUANTIZED_BITS or bool(load.stored)
    found = []
    for place in (0, spec.blocks - 1):
        sizes = [prod(shape) * load.item_bytes for shape in block_shapes(spec, place).values() if len(shape) == 2]
        found.append(sum(sizes) + (int(_UNPACKING * max(sizes)) if is_packed and not memory.is_gpu() else 0))
    return max(found) * (2 if memory.is_gpu() else 1)


def _work_bytes(spec: TransformerSpec, load: Load, bits: int, heads: int, pieces: int | None) -> tuple[int, int]:
    """What a block's backward pass holds at its peak, `heads` at a time: arrays, and dense copies of matrices."""
    is_gpu, rows = memory.is_gpu(), load.batch * load.rows
    unit, scores = rows * spec.hidden * load.item_bytes, heads * rows * load.rows * load.item_bytes
    masks = _MASK_BYTES * rows * (spec.hidden + spec.mlp_width) if load.dropout else 0  # of the widest linear
    matrix = _largest_matrix(spec) * load.item_bytes if _is_made_dense(load, bits) else 0
    fewer_units, fewer_matrices = _FEWER_PIECES[is_gpu].get(pieces, (0, 0.0)) if pieces is not None else (0, 0.0)
    found = [
        ((units - fewer_units + _KIND_UNITS[load.kind]) * unit + masks, int((matrices - fewer_matrices) * matrix))
        for units, matrices in (_ON_GPU if is_gpu else _ON_CPU)
    ]
    if not load.fused_attention:
        usual, dense = found[0]
        found[0] = max(usual, (_ATTENTION_UNITS - fewer_units) * unit + _SCORES * scores), dense
    return max(found, key=sum)


def block_bytes(spec: TransformerSpec, place: int, bits: int, stored: Stock | None = None) -> int:
    """What one block's weights take in memory."""
    shapes = {f"{block_path(spec, place)}.{name}": shape for name, shape in block_shapes(spec, place).items()}
    return base.held_bytes(shapes, bits, stored or {})


def kept_bytes(spec: TransformerSpec, load: Load, place: int) -> int:
    """What keeping one block's projections takes: q, k, v, gate and up, in a double block also the middle stream."""
    width = 3 * spec.hidden + 2 * spec.mlp_width + (spec.hidden if place < spec.double_blocks else 0)
    return load.batch * load.rows * width * load.item_bytes


def has_fused_attention(rows: int) -> bool:
    """Whether attention's gradient has a kernel: on CUDA, where rows that 128 does not divide are padded."""
    return memory.is_cuda() and rows > 0


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


def _is_made_dense(load: Load, bits: int) -> bool:
    """Whether weights are used in another form than they are kept in."""
    own = 4 if bits == 32 else 2
    return bits in QUANTIZED_BITS or own != load.item_bytes or bool(load.stored)


def _packing_bytes(spec: TransformerSpec, load: Load, bits: int) -> int:
    """What is held besides the packed block while it is read: blocks are packed matrix by matrix."""
    return _PACKING_BYTES * _largest_matrix(spec) if bits in QUANTIZED_BITS and not load.stored else 0


def _largest_matrix(spec: TransformerSpec) -> int:
    return spec.hidden * (3 * spec.hidden + 2 * spec.mlp_width)


def _with_kept(spec: TransformerSpec, loads: Sequence[Load], layout: Layout, budget_bytes: int) -> Layout:
    """The same layout with as many kept blocks as the budget has room for, the last ones first."""
    previews = layout.parts[_PREVIEWS]  # what a step keeps has gone when they are drawn
    keep, kept, room = 0, 0, budget_bytes - layout.peak_bytes + previews
    for place in reversed(range(spec.blocks)):
        size = sum(kept_bytes(spec, load, place) for load in loads)
        if kept + size > room:
            break
        keep, kept = keep + 1, kept + size
    parts = {**layout.parts, "kept projections": kept, _PREVIEWS: max(0, previews - kept)}
    return replace(layout, keep=keep, parts=parts)
