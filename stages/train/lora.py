"""Low-rank adapters: which linears get one, how they start, how they are named outside.

y = Wx + (alpha / rank) B(Ax), A [rank, in], B [out, rank], both float32 whatever the base is: a bfloat16 weight of
1.0 does not move under steps of 1e-4. B starts at zero, so step 0 is the base model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import dropout, randomness
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
    return sum(rank_of(path, options) * (rows + columns) for path, (rows, columns) in targets(spec, options).items())


def attach(transformer: Transformer, options: LoraOptions, seed: int) -> None:
    """Give the transformer fresh adapters: A uniform within 1/sqrt(in) (Kaiming, a = sqrt 5), B zero.

    Each A depends on (seed, path) alone: other targets or another order change nothing about it.
    """
    adapters = {}
    for path, (rows, columns) in targets(transformer.spec, options).items():
        rank = rank_of(path, options)
        bound = 1 / math.sqrt(columns)
        a = mx.random.uniform(-bound, bound, (rank, columns), key=randomness.key(seed, "lora", path))
        adapters[path] = (a, mx.zeros((rows, rank)), mx.array(options.alpha / rank, mx.float32))
    mx.eval(adapters)
    transformer.adapters = adapters


def parameters(transformer: Transformer) -> dict[str, mx.array]:
    """What is trained, in diffusers names: `PATH.lora_A.weight` [rank, in] and `PATH.lora_B.weight` [out, rank]."""
    named = {}
    for path, (a, b, _) in transformer.adapters.items():
        named |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    return named


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
        path: (values[f"{path}.lora_A.weight"], values[f"{path}.lora_B.weight"], scale)
        for path, (_, _, scale) in transformer.adapters.items()
    }


def metadata(transformer: Transformer, options: LoraOptions) -> dict[str, str]:
    """How a file of `parameters` must be read: alpha is not folded in; the keys are those of diffusers and peft."""
    ranks = {path: adapter[0].shape[0] for path, adapter in transformer.adapters.items()}
    said = {
        "lora_alpha": options.alpha,
        "r": options.rank,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != options.rank},
        "target_modules": list(ranks),
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
        path: (*adapter, dropout.keys(seed, step, places, path), keep) for path, adapter in transformer.adapters.items()
    }
    return replace(transformer, adapters=adapters)
