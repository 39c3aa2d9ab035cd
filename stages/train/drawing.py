"""Pictures on demand: contexts from the store, one transformer with adapters mixed at each strength, latents to files.

Like previews, but of no run: the VAE is another process and so is the text encoder. Orders come with their file names;
latents that are there already are not drawn again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from flux2_relay.cache import Store
from flux2_relay.cache.errors import RelayError
from flux2_relay.stages import blas, identity
from flux2_relay.stages.device_errors import in_plain_words
from flux2_relay.stages.files import write_tensors
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.one_model import in_turn, say_loaded
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import base, forward_layout, mixing
from flux2_relay.stages.train.contexts import Contexts, open_contexts, to_mlx
from flux2_relay.stages.train.layout import Layout
from flux2_relay.stages.train.options import Dtype, MemoryOptions
from flux2_relay.stages.train.residence import Resident, Streamed
from flux2_relay.stages.train.sample import Picture, draw
from flux2_relay.stages.train.transformer import Transformer, base_shapes, load_transformer

NUMERICS = 1  # part of every picture's key: raise it when the drawing's own code changes its numbers on purpose
_CACHE_BYTES = 1 << 30  # freed buffers kept for reuse


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One picture: keys of what it is drawn from, how, and the file its latents go to."""

    latents: Path
    context: str
    negative: str | None  # None where the model reads none
    references: tuple[str, ...]
    size: tuple[int, int]  # width, height in pixels
    seed: int
    steps: int
    guidance: float
    strengths: tuple[float, ...]  # one for each adapter of the job
    told: Mapping[str, str] = field(default_factory=dict)  # the latents' metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingJob:
    """What to draw, with which adapters, from which store."""

    store: Store
    body: Mapping[str, object]  # of the set that holds the contexts
    orders: Sequence[Order]
    adapters: Sequence[Path]
    memory: MemoryOptions
    dtype: Dtype
    layout: Layout
    say: Callable[[str], None]


def draw_all(job: DrawingJob, places: ModelFolders, spec: TransformerSpec) -> int:
    """Draw the orders whose latents are not there yet -> how many; the transformer is loaded for nothing less."""
    todo = [order for order in job.orders if not order.latents.exists()]
    if todo:
        job.say(f"memory: {forward_layout.told(job.layout)}")
        in_turn("transformer", partial(_draw, job, todo, places, spec), job.say, job.layout.peak_bytes)
    return len(todo)


def _draw(job: DrawingJob, todo: Sequence[Order], places: ModelFolders, spec: TransformerSpec) -> None:
    mx.set_cache_limit(_CACHE_BYTES)
    contexts = open_contexts(job.store, job.body, spec.context_width)
    updates = mixing.read_all(job.adapters, spec)
    with in_plain_words(lambda: "Pictures drawn before are kept; the same command draws the others."):
        transformer = _load(job, places, spec)
        try:
            _draw_each(transformer, todo, [mixing.measured(of, transformer) for of in updates], contexts)
        finally:
            transformer.residence.close()


def _draw_each(
    transformer: Transformer, todo: Sequence[Order], updates: Sequence[mixing.Updates], contexts: Contexts
) -> None:
    with tqdm(total=sum(order.steps for order in todo), desc="pictures", unit="step", dynamic_ncols=True) as bar:
        for number, (order, adapters) in enumerate(_with_adapters(todo, updates), start=1):
            transformer.adapters = adapters
            bar.set_postfix_str(f"picture {number} of {len(todo)}", refresh=False)
            latents = draw(transformer, _picture(order, contexts), bar.update)
            _refuse_broken(latents, order)
            write_tensors(order.latents, {"latents": latents}, order.told)


def _refuse_broken(latents: mx.array, order: Order) -> None:
    if not mx.all(mx.isfinite(latents)).item():
        raise RelayError(
            f"{order.latents.stem}: the picture holds values that are not finite, so it was not written; a smaller "
            "scale of the adapters is the usual remedy, then more memory.bits"
        )


def _with_adapters(todo: Sequence[Order], updates: Sequence[mixing.Updates]) -> Iterator[tuple[Order, dict]]:
    """Each order with what is to be attached for it; adapters are mixed once for all pictures of a strength."""
    together = sorted(todo, key=lambda order: order.strengths)
    for strengths, orders in groupby(together, key=lambda order: order.strengths):
        mixed = mixing.mix(updates, strengths)
        yield from ((order, mixed) for order in orders)


def _load(job: DrawingJob, places: ModelFolders, spec: TransformerSpec) -> Transformer:
    blas.suit(spec.hidden)
    layout = job.layout
    residence = partial(Streamed, resident=layout.resident, ahead=layout.ahead) if layout.streamed else Resident
    transformer = load_transformer(
        places.root,
        spec,
        layout.bits,
        mx.float32 if job.dtype == "float32" else mx.bfloat16,
        residence,
        Path(job.memory.copy).expanduser() if job.memory.copy else None,
    )
    weights = layout.stored or f"{layout.bits} bit"
    say_loaded(f"transformer ({spec.double_blocks} + {spec.single_blocks} blocks, {weights})", job.say)
    return transformer


def _picture(order: Order, contexts: Contexts) -> Picture:
    width, height = order.size
    return Picture(
        context=contexts.context(order.context),
        negative=None if order.negative is None else contexts.context(order.negative),
        height=height // 16,
        width=width // 16,
        seed=order.seed,
        steps=order.steps,
        guidance=order.guidance,
        references=tuple(to_mlx(contexts.store.read("latents", key)) for key in order.references),
    )


def identity_of(places: ModelFolders, spec: TransformerSpec, say: Callable[[str], None]) -> str:
    """SHA-256 of the transformer's weights and config; hashes what this machine has not hashed before."""
    tensors = base.open_base(places.transformer, base_shapes(spec))
    if not identity.is_cheap(tensors):
        say(f"hashing {in_words(identity.size_of(tensors))} of transformer weights (once on this machine)")
    return identity.weights_identity(tensors, base.tensors_below(tensors, "", base_shapes(spec)), asdict(spec))
