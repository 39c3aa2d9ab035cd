"""Adapters of a transformer: which linears get one, of which kind, how they start, how they are named outside.

They are float32 whatever the base is: a bfloat16 weight of 1.0 does not move under steps of 1e-4. Every kind
(`kinds.py`, `dora.py`, `lokr.py`) starts as the base model: what is said of the kinds here is how.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import dropout, lokr, randomness, visits
from flux2_relay.stages.train.dora import Dora
from flux2_relay.stages.train.kinds import Adapter, Lora
from flux2_relay.stages.train.lokr import Lokr
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import Transformer, block_linears
from flux2_relay.stages.weights import listing

__all__ = ["LoraOptions", "attach", "load", "metadata", "parameters", "rank_of", "targets", "with_dropout"]


def targets(spec: TransformerSpec, options: LoraOptions) -> dict[str, tuple[int, int]]:
    """Path of every linear that gets an adapter -> (out, in).

    InputError names each pattern of `targets`, `exclude` and `ranks` that matches no linear: a typing error here
    would otherwise train less than was asked, without a word.
    """
    linears = block_linears(spec)
    wanted = options.targets if isinstance(options.targets, tuple) else (options.targets,)
    patterns = [("targets", pattern) for pattern in wanted if pattern not in _GROUPS]
    patterns += [("exclude", pattern) for pattern in options.exclude] + [
        ("ranks", pattern) for pattern in options.ranks
    ]
    idle = [
        f"lora.{key}: '{pattern}'" for key, pattern in patterns if not any(_matches(path, pattern) for path in linears)
    ]
    if idle:
        raise InputError(
            listing(
                "these patterns match no linear of this model (e.g. 'to_q', '*.attn.*', 'ff.linear_in'):",
                idle,
            )
        )
    chosen = {path: shape for path, shape in linears.items() if any(_matches(path, pattern) for pattern in wanted)}
    chosen = {path: shape for path, shape in chosen.items() if not any(_matches(path, p) for p in options.exclude)}
    if not chosen:
        raise InputError("lora.targets and lora.exclude leave no linear to train")
    return chosen


_GROUPS = {"blocks": "*", "attention": "*.attn.*"}


def _matches(path: str, pattern: str) -> bool:
    """A group's name, a module's name or path ending (`to_q`, `attn.to_out.0`), or a shell pattern over the path."""
    pattern = _GROUPS.get(pattern, pattern)
    return path == pattern or path.endswith("." + pattern) or fnmatchcase(path, pattern)


def rank_of(path: str, options: LoraOptions) -> int:
    """The rank of the adapter at `path`: that of the first pattern of `ranks` that matches, else `rank`."""
    return next((rank for pattern, rank in options.ranks.items() if _matches(path, pattern)), options.rank)


def size(spec: TransformerSpec, options: LoraOptions) -> int:
    """Weights of all adapters together."""
    kind = _KINDS[options.kind]
    return sum(
        kind.size(rows, columns, rank_of(p, options), options) for p, (rows, columns) in targets(spec, options).items()
    )


@dataclass(frozen=True, slots=True)
class Seat:
    """The linear that an adapter is made for, and what randomness it may use."""

    path: str
    rows: int
    columns: int
    seed: int

    def uniform(self, shape: tuple[int, int], *purpose: str) -> mx.array:
        """Values within 1/sqrt(in) (Kaiming, a = sqrt 5), of (seed, path, purpose) alone."""
        bound = 1 / math.sqrt(shape[1])
        return mx.random.uniform(-bound, bound, shape, key=randomness.key(self.seed, "lora", self.path, *purpose))


def _fresh_lora(seat: Seat, rank: int, options: LoraOptions) -> Lora:
    """A random, B zero."""
    scale = mx.array(options.alpha / rank, mx.float32)
    return Lora(seat.uniform((rank, seat.columns)), mx.zeros((seat.rows, rank)), scale)


def _fresh_dora(seat: Seat, rank: int, options: LoraOptions) -> Dora:
    """The same; the lengths of the base's rows are measured later."""
    low, unknown = _fresh_lora(seat, rank, options), mx.zeros(seat.rows)
    return Dora(low.a, low.b, low.scale, magnitude=unknown, squares=unknown)


def _fresh_lokr(seat: Seat, rank: int, options: LoraOptions) -> Lokr:
    """W1 random, W2 zero: whole, or as random times zero. Scaled by alpha / rank only where W2 has a rank."""
    of_w1, (k, n), is_low = lokr.shape_of(seat.rows, seat.columns, rank, options.factor)
    w2 = (seat.uniform((k, rank), "w2"), mx.zeros((rank, n))) if is_low else (mx.zeros((k, n)),)
    return Lokr(seat.uniform(of_w1), w2, mx.array(options.alpha / rank if is_low else 1.0, mx.float32))


@dataclass(frozen=True, slots=True)
class _Kind:
    """One value of `lora.kind`: a fresh adapter, the number of its weights, and whether it must see the base's."""

    fresh: Callable[[Seat, int, LoraOptions], Adapter]
    size: Callable[[int, int, int, LoraOptions], int]
    measures: bool = False
    said: Mapping[str, object] = field(default_factory=dict)
    """What peft's config says of it besides: diffusers then refuses what it would read as a LoRA."""


def _lora_size(rows: int, columns: int, rank: int, options: LoraOptions) -> int:
    return rank * (rows + columns)


def _dora_size(rows: int, columns: int, rank: int, options: LoraOptions) -> int:
    return rank * (rows + columns) + rows


def _lokr_size(rows: int, columns: int, rank: int, options: LoraOptions) -> int:
    (p, q), (k, n), is_low = lokr.shape_of(rows, columns, rank, options.factor)
    return p * q + (rank * (k + n) if is_low else k * n)


_KINDS: Mapping[str, _Kind] = {
    "lora": _Kind(_fresh_lora, _lora_size),
    "dora": _Kind(_fresh_dora, _dora_size, measures=True, said={"use_dora": True}),
    "lokr": _Kind(_fresh_lokr, _lokr_size),
}


def attach(transformer: Transformer, options: LoraOptions, seed: int) -> None:
    """Give the transformer fresh adapters, which change nothing yet.

    Each depends on (seed, path) alone: other targets or another order change nothing about it. DoRA reads every block
    that it is attached to once.
    """
    kind, adapters = _KINDS[options.kind], {}
    for path, (rows, columns) in targets(transformer.spec, options).items():
        adapters[path] = kind.fresh(Seat(path, rows, columns, seed), rank_of(path, options), options)
    mx.eval(adapters)
    transformer.adapters = adapters
    if kind.measures:
        measure(transformer)


def measure(transformer: Transformer) -> None:
    """Set the lengths of the base's rows in every DoRA, and its magnitudes to them."""
    adapters = dict(transformer.adapters)
    for path, weight in visits.linears(transformer, adapters):
        adapter = adapters[path]
        assert isinstance(adapter, Dora)
        squares = []
        for rows in visits.stretches(weight, adapter.a.shape[1]):
            squares.append(mx.sum(mx.square(rows), axis=-1))
            mx.eval(squares[-1])  # the rows of one stretch at a time
        of_rows = mx.concatenate(squares)
        adapters[path] = adapter._replace(magnitude=mx.sqrt(of_rows), squares=of_rows)
        mx.eval(adapters[path])
    transformer.adapters = adapters


def parameters(transformer: Transformer) -> dict[str, mx.array]:
    """What is trained, under diffusers' module paths and peft's names of factors (`PATH.lora_A.weight` [rank, in])."""
    return {
        f"{path}.{what}": value
        for path, adapter in transformer.adapters.items()
        for what, value in adapter.weights().items()
    }


def starts_at_zero(name: str) -> bool:
    """Whether a weight of this name does, so that the first update must move it."""
    return name.endswith(("lora_B.weight", "lokr_w2", "lokr_w2_b"))


def load(transformer: Transformer, values: Mapping[str, mx.array]) -> None:
    """Set the adapters to `values` (names and shapes of `parameters`); scales stay."""
    current = parameters(transformer)
    faults = [f"{name} is missing" for name in current if name not in values]
    faults += [f"{name} belongs to no adapter of this run" for name in values if name not in current]
    faults += [
        f"{name}: expected {current[name].shape}, found {values[name].shape}"
        for name in values
        if name in current and current[name].shape != values[name].shape
    ]
    if faults:
        raise InputError(listing("these adapter weights do not fit lora.targets and lora.rank:", faults))
    transformer.adapters = {
        path: adapter.with_weights({what: values[f"{path}.{what}"] for what in adapter.weights()})
        for path, adapter in transformer.adapters.items()
    }


def metadata(transformer: Transformer, options: LoraOptions) -> dict[str, str]:
    """How a file of `parameters` must be read: alpha is not folded in; the keys are those of diffusers and peft."""
    ranks = {path: rank_of(path, options) for path in transformer.adapters}
    said = {
        "lora_alpha": options.alpha,
        "r": options.rank,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != options.rank},
        "target_modules": list(ranks),
        **_KINDS[options.kind].said,
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in said.items()})}


def with_dropout(transformer: Transformer, share: float, seed: int, step: int, places: Sequence[int]) -> Transformer:
    """The same transformer for one pass of training, which drops `share` of the input of each adapter.

    `places` are those of the pass's items in the step's whole batch. Previews and validation use the transformer as it
    was, which drops nothing.
    """
    if not share:
        return transformer
    keep = mx.array(1 - share, mx.float32)
    adapters = {
        path: adapter.with_dropout((dropout.keys(seed, step, places, path), keep))
        for path, adapter in transformer.adapters.items()
    }
    return replace(transformer, adapters=adapters)
