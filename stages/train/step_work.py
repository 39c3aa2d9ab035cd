"""What a step of training holds in memory at its peak, by what it is for: the numbers that `layout.py` decides with.

A model of the peak, not a trial: the plan must know it before a weight is read. Its constants were read off the pieces
of `backward.py` (docs/performance.md says how), and the run prints the prediction beside what it measured.

Letters: R rows of a step's pass (batch times text and image tokens), D hidden, M MLP width, N heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from flux2_relay.stages import memory
from flux2_relay.stages.quantize import QUANTIZED_BITS
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import base, forward_work
from flux2_relay.stages.train.base import Stock
from flux2_relay.stages.train.residence import resident_places
from flux2_relay.stages.train.transformer import block_path, block_shapes, outer_shapes

_ON_CPU, _ON_GPU = ((57, 2.5), (36, 4.2)), ((51, 2.5),)
"""What a block's backward pass holds beside inputs and kept tensors at the moments when that is most: arrays of
[R, D], and dense copies of the largest matrix where weights are kept in another form than they are used."""
_FEWER_IN_DOUBLE = 14
"""Arrays of [R, D] that a double block's backward pass holds less than a single one's."""
_ATTENTION_UNITS, _SCORES = 35, 4
"""Where attention is not fused: units beside the scores, and arrays as large as the scores of a chunk."""
AHEAD = 1
"""Blocks being read while another is worked on."""
_PACKING_BYTES = 2
"""A weight of a matrix that is packed while its block is read, as the file has it."""
_MASK_BYTES = 5
"""An element of an adapter's input under dropout: random bits and the mask made of them."""
_KIND_UNITS: Mapping[str, int] = {"lora": 0, "dora": 24, "lokr": 32}
"""Units besides, by `lora.kind`: DoRA computes outputs once more and scales cotangents, LoKr joins those in pieces."""
FEWER_PIECES = {True: {3: (0, 0.0), 2: (1, 1.0), 1: (2, 1.6)}, False: {1: (0, 0.0), 0: (11, 1.0)}}
"""On a GPU and not: pieces under way, the most first -> arrays and dense copies that this saves."""
_UNPACKING = 2.5
"""What making a packed matrix dense takes beside the result, in matrices, where it is not one kernel: on a CPU."""
_OPTIMIZER_COPIES = 3
"""Adapter-sized arrays that an update makes beside those that stay."""
PREVIEWS = "larger previews"


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


def parts(spec: TransformerSpec, load: Load, bits: int, resident: int, keep: int, pieces: int | None) -> dict[str, int]:
    """Bytes by what they are for, of one training with `resident` blocks in memory; arguments as in `Layout`."""
    unit, heads = stream_bytes(spec, load), heads_at_a_time(spec, load)
    sizes = [block_bytes(spec, place, bits, load.stored) for place in range(spec.blocks)]
    weights = base.held_bytes(outer_shapes(spec), bits, load.stored)
    weights += sum(sizes[place] for place in resident_places(spec.blocks, resident))
    work, dense = _work_bytes(spec, load, bits, heads or spec.heads, pieces)
    found = {
        "weights": weights,
        "blocks on their way": 0
        if resident == spec.blocks
        else _on_their_way(spec, sizes, unit) + AHEAD * _packing_bytes(spec, load, bits),
        "dense copies": dense,
        "adapter, gradients, moments": load.adapter_copies * load.adapter_bytes,
        "block inputs": spec.blocks * unit,
        "kept projections": sum(kept_bytes(spec, load, place) for place in range(spec.blocks - keep, spec.blocks)),
        "one block's work": max(work, _OPTIMIZER_COPIES * load.adapter_bytes - spec.blocks * unit),
    }
    return {**found, PREVIEWS: _beyond_steps(spec, [load], found)}


def _on_their_way(spec: TransformerSpec, sizes: Sequence[int], unit: int) -> int:
    """Blocks that are worked on and read at the moment of the most: in the first single block, or in a double one.

    In the first single block the next one is a double one. Where that is followed by another, two of these are there,
    but the inputs of single blocks have gone and less is worked on. On a GPU pieces under way may still need the block
    before.
    """
    copies, double = (2 if memory.is_gpu() else 1), max(sizes)
    in_single = copies * sizes[-1] + AHEAD * double
    if spec.double_blocks < 2:
        return in_single
    return max(in_single, (copies + AHEAD) * double - (_FEWER_IN_DOUBLE + spec.single_blocks) * unit)


def parts_together(
    spec: TransformerSpec, loads: Sequence[Load], bits: int, each: Sequence[Mapping[str, int]], joined: bool
) -> dict[str, int]:
    """Bytes of several trainings that share each block's weights, from the `parts` of each alone.

    `joined`: whether those that can go through a block as one batch (`beside.py`), else all of them in turns.
    """
    found = dict(each[0])  # weights, and blocks on their way, are there once
    for name in ("adapter, gradients, moments", "block inputs", "kept projections"):
        found[name] = sum(one[name] for one in each)
    streams, works = [stream_bytes(spec, load) for load in loads], [one["one block's work"] for one in each]
    groups = joinable(loads) if joined else [[place] for place in range(len(loads))]
    found["one block's work"] = max(  # the others wait with their streams
        sum(works[place] if place in group else streams[place] for place in range(len(loads))) for group in groups
    )
    found["dense copies"] = _dense_block_bytes(spec, loads[0], bits) if _is_made_dense(loads[0], bits) else 0
    return {**found, PREVIEWS: _beyond_steps(spec, loads, found)}


def joinable(loads: Sequence[Load]) -> list[list[int]]:
    """Which of the trainings can stand in one batch: those of plain LoRA without dropout, and of one batch size."""
    groups: dict[object, list[int]] = {}
    for place, load in enumerate(loads):
        joins = load.kind == "lora" and not load.dropout
        groups.setdefault(("batches of", load.batch) if joins else place, []).append(place)
    return list(groups.values())


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
    fewer_units, fewer_matrices = FEWER_PIECES[is_gpu].get(pieces, (0, 0.0)) if pieces is not None else (0, 0.0)
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


def _is_made_dense(load: Load, bits: int) -> bool:
    """Whether weights are used in another form than they are kept in."""
    own = 4 if bits == 32 else 2
    return bits in QUANTIZED_BITS or own != load.item_bytes or bool(load.stored)


def _packing_bytes(spec: TransformerSpec, load: Load, bits: int) -> int:
    """What is held besides the packed block while it is read: blocks are packed matrix by matrix."""
    return _PACKING_BYTES * _largest_matrix(spec) if bits in QUANTIZED_BITS and not load.stored else 0


def _largest_matrix(spec: TransformerSpec) -> int:
    return spec.hidden * (3 * spec.hidden + 2 * spec.mlp_width)
