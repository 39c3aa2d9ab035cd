"""`relay init`, the machine: which model, and at which resolution it trains in this machine's memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.init_data import Found
from flux2_relay.stages import figures, folders, hub, memory, spec
from flux2_relay.stages.catalogue import CATALOGUE, SOURCES, download_all
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import lora
from flux2_relay.stages.train.batches import Item
from flux2_relay.stages.train.layout import Layout, LayoutOptions, layout_for
from flux2_relay.stages.train.options import LoraOptions, MemoryOptions, TrainOptions
from flux2_relay.stages.train.step_work import block_bytes

_SMALLEST_MODEL = "klein-base-4b"
_RESOLUTIONS = 1024, 768, 512
_SMALLER = 384, 256, 128, 64
_FULL = 0.75
"""Share of the pictures that should have the pixels that a resolution asks for."""
_TEXT_ROWS = 512  # of every released model; a checkpoint's own config goes before
_MOST_ON_CPU = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The model to train."""

    path: str
    name: str | None
    """The catalogue's name, None for another size."""
    transformer: TransformerSpec
    distilled: bool
    text_rows: int
    why: str
    to_download: str | None
    """The command that fetches it, where it is not on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How the training fits this machine."""

    resolution: int
    why: str
    layout: Layout
    budget_bytes: int
    device: str
    is_gpu: bool

    @property
    def dtype(self) -> str:
        """The compute type: bfloat16 is slow on CPUs."""
        return "bfloat16" if self.is_gpu else "float32"


def model(named: str | None) -> Model:
    """The model of this name (of the catalogue) or at this place; None takes what lies in the Hugging Face cache."""
    if named is None:
        return _of_cache()
    if named in CATALOGUE:
        return _known(named, "you named it")
    places = folders.find(named)
    transformer, distilled = spec.read_transformer_spec(places.transformer), spec.read_distilled(places.root)
    is_here = folders.is_there("text_encoder", places.text_encoder)
    return Model(
        path=named,
        name=spec.known_name(transformer, distilled),
        transformer=transformer,
        distilled=distilled,
        text_rows=spec.read_text_spec(places.text_encoder).length if is_here else _TEXT_ROWS,
        why="you named it",
        to_download=None,
    )


def _of_cache() -> Model:
    """The largest base model in the Hugging Face cache that trains here, else the smallest base model."""
    here = [name for name in CATALOGUE if not CATALOGUE[name][1] and hub.snapshot(SOURCES[name].repository)]
    budget = memory.budget_bytes("auto")
    sizes = {name: _least_bytes(CATALOGUE[name][0]) for name in here}
    fitting = [name for name in here if sizes[name] <= budget] or here
    if not fitting:
        return _known(_SMALLEST_MODEL, "none was named and none lies in the Hugging Face cache: this is the smallest")
    return _known(max(fitting, key=lambda name: sizes[name]), "it lies in the Hugging Face cache of this machine")


def _least_bytes(transformer: TransformerSpec) -> int:
    """Weights of all blocks at 8 bit."""
    return sum(block_bytes(transformer, place, 8) for place in range(transformer.blocks))


def _known(name: str, why: str) -> Model:
    (transformer, distilled), repository = CATALOGUE[name], SOURCES[name].repository
    return Model(
        path=repository,
        name=name,
        transformer=transformer,
        distilled=distilled,
        text_rows=_TEXT_ROWS,
        why=why,
        to_download=None if hub.snapshot(repository) else download_all(name),
    )


def fit(of: Model, found: Found, batch: int) -> Fit:
    """The largest usual resolution that the pictures fill and at which all weights stay in memory, 8 or 4 bit at worst.

    Where none does, the largest at which training works at all; InputError where nothing does.
    """
    is_gpu, budget = memory.is_gpu(), memory.budget_bytes("auto")
    usual = [r for r in _RESOLUTIONS if found.filling(r) >= _FULL and (is_gpu or r <= _MOST_ON_CPU)]
    candidates = usual or [_of_small(found)]
    why = "most pictures have no more pixels than this"
    if usual:
        limit = "" if is_gpu else ", on a CPU not above 512"
        why = f"the largest usual one that most pictures fill and at which all weights stay in memory{limit}"
    resident = [MemoryOptions(bits=bits, stream="never") for bits in ((16, 8, 4) if is_gpu else (32,))]
    tried = [(r, options) for options in resident for r in candidates]
    streamed = MemoryOptions(bits=4 if is_gpu else 32)
    tried += [(r, streamed) for r in (min(candidates), *(r for r in _SMALLER if r < min(candidates)))]
    for resolution, options in tried:
        layout = _layout(of, found, resolution, LayoutOptions(train=_options(batch, is_gpu), memory=options))
        if layout is None:
            continue
        if layout.streamed:
            why = "not all blocks stay in memory at any usual resolution, so some are read from disk at each step"
        return Fit(
            resolution=resolution,
            why=why,
            layout=layout,
            budget_bytes=budget,
            device=figures.device(),
            is_gpu=is_gpu,
        )
    raise InputError(
        f"{of.path}: no resolution of at least {_SMALLER[-1]} trains in the {budget / 1e9:.1f} GB that are "
        "this machine's budget; name a smaller model with --model"
    )


def _of_small(found: Found) -> int:
    """For pictures below 512 x 512: the side of a square with the median picture's pixels, to the lower 16."""
    areas = sorted(header.width * header.height for header in found.headers)
    return max(16, min(512, int(areas[len(areas) // 2] ** 0.5) // 16 * 16))


def _options(batch: int, is_gpu: bool) -> TrainOptions:
    return TrainOptions(batch=batch, dtype="bfloat16" if is_gpu else "float32")


def _layout(of: Model, found: Found, resolution: int, options: LayoutOptions) -> Layout | None:
    """The layout, None where it does not fit."""
    adapter = lora.size(of.transformer, LoraOptions())
    try:
        return layout_for(of.transformer, list(_items(found, resolution)), of.text_rows, adapter, options)
    except InputError:
        return None


def _items(found: Found, resolution: int) -> Iterable[Item]:
    for width, height in found.buckets(resolution):
        yield Item(id="", latents="", size=(height // 16, width // 16), captions=())
