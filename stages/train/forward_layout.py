"""How drawing pictures fits the memory budget: the decisions of `layout.py` without anything for a backward pass.

A forward pass keeps no block inputs and no projections, and no gradients or moments exist.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import memory
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import forward_work, layout
from flux2_relay.stages.train.base import Stock
from flux2_relay.stages.train.layout import Layout
from flux2_relay.stages.train.options import Dtype, MemoryOptions
from flux2_relay.stages.train.step_work import Load

_COPIES = 2
"""Of the adapters: as they were read, and mixed at a strength."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingLoad:
    """What one forward pass has to carry."""

    rows: int  # text tokens and those of the picture and its references
    adapter_bytes: int  # A and B of all files, float32
    dtype: Dtype
    stored: Stock = field(default_factory=dict)  # what the checkpoint has packed already


def choose(spec: TransformerSpec, load: DrawingLoad, options: MemoryOptions) -> Layout:
    """The fastest layout whose predicted peak stays under the budget; InputError says the smallest that works."""
    budget_bytes = memory.budget_bytes(options.budget)
    tried = [predict(spec, load, bits, resident) for bits, resident in _candidates(spec, load, options)]
    fitting = next((one for one in tried if one.peak_bytes <= budget_bytes), None)
    if fitting is None:
        least = min(tried, key=lambda one: one.peak_bytes)
        raise InputError(
            f"memory.budget: {in_words(budget_bytes)} is too little to draw with this model at this size; the least "
            f"that works with these settings is {in_words(least.peak_bytes)} ({told(least)})"
        )
    return fitting


def _candidates(spec: TransformerSpec, load: DrawingLoad, options: MemoryOptions) -> Iterator[tuple[int, int]]:
    """(bits, resident blocks), fastest first."""
    own = 32 if load.dtype == "float32" else 16
    residents = {"always": [0], "never": [spec.blocks], "auto": list(reversed(range(spec.blocks + 1)))}
    for bits in (own, 8) if options.bits == "auto" else (options.bits,):
        for resident in residents[options.stream]:
            yield bits, resident


def predict(spec: TransformerSpec, load: DrawingLoad, bits: int, resident: int) -> Layout:
    """The layout of these decisions with its predicted peak."""
    item_bytes = 4 if load.dtype == "float32" else 2
    of_training = Load(
        batch=1,
        rows=load.rows,
        adapter_bytes=load.adapter_bytes,
        adapter_copies=_COPIES,
        item_bytes=item_bytes,
        fused_attention=True,  # nothing of attention's gradient is needed
        stored=load.stored,
    )
    found = layout.predict(spec, of_training, bits, resident)
    parts = {
        name: size for name, size in found.parts.items() if name in ("weights", "blocks on their way", "dense copies")
    }
    parts["adapters"] = _COPIES * load.adapter_bytes
    parts["one block's work"] = forward_work.work_bytes(spec, load.rows, item_bytes)
    return replace(found, keep=0, heads=0, parts=parts)


def told(chosen: Layout) -> str:
    """The decisions and the prediction, in one sentence."""
    where = f"{chosen.resident} of {chosen.blocks} blocks resident" if chosen.streamed else "all blocks resident"
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in chosen.parts.items() if size)
    weights = chosen.stored or f"{chosen.bits} bit"
    return f"{weights}, {where}; predicted peak {in_words(chosen.peak_bytes)} ({parts})"
