"""The update rule: MLX's optimizers on the flat dictionary of adapter weights, a schedule, a clip, a state that saves.

MLX's AdamW leaves bias correction off unless asked (its first updates are then three times too large); with it, it
equals torch's. All of it is float32: weights, gradients, moments.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import memory
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.prodigy import Prodigy

Parameters = dict[str, mx.array]
State = dict[str, Any]
_COMPILED = ("adamw", "lion")
"""Rules that are compiled on a GPU, where hundreds of adapters mean thousands of small kernels an update."""
_MARK = "|"  # between a parameter's name and the name of its moment; no tensor name has it


class Optimizer:
    """One update at a time; `state()` and `restore()` make the next one independent of what process did the last."""

    def __init__(self, options: TrainOptions, parameters: Mapping[str, mx.array]) -> None:
        """Fresh moments for `parameters`."""
        self._options = options
        self._rule = _rule(options)
        self._rule.init(dict(parameters))
        applied = partial(_applied, self._rule)  # of the rule alone: a method would keep this object, and be kept by it
        self._apply = mx.compile(applied) if memory.is_gpu() and options.optimizer in _COMPILED else applied
        mx.eval(self._rule.state)

    def update(self, parameters: Parameters, gradients: Mapping[str, mx.array], step: int) -> Parameters:
        """The parameters after update number `step` (from 0) with the learning rate of that step."""
        self._rule.learning_rate = mx.array(learning_rate(self._options, step), mx.float32)
        updated, self._rule.state = self._apply(parameters, dict(gradients), self._rule.state)
        mx.eval(updated, self._rule.state)
        return updated

    def state(self) -> Parameters:
        """Everything that the next update depends on, flat."""
        flat: Parameters = {}
        for name, value in self._rule.state.items():
            flat |= (
                {f"{name}{_MARK}{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
            )
        return flat

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """Go on from `state`; InputError where it belongs to another optimizer or other adapters."""
        if state.keys() != self.state().keys():
            raise InputError(
                "the checkpoint's optimizer state does not fit train.optimizer and lora.targets of this config; "
                "use the config that the run began with, or another run.name"
            )
        nested: dict[str, object] = {}
        for name, value in state.items():
            path, mark, part = name.partition(_MARK)
            if mark:
                nested.setdefault(path, {})[part] = value  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
            else:
                nested[path] = value
        self._rule.state = nested


def _applied(
    rule: optimizers.Optimizer | Prodigy, parameters: Parameters, gradients: Parameters, state: State
) -> tuple[Parameters, State]:
    """The rule as a function of all it depends on, which is what can be compiled."""
    rule.state = state
    return rule.apply_gradients(gradients, parameters), rule.state


def _rule(options: TrainOptions) -> optimizers.Optimizer | Prodigy:
    betas, decay = list(options.betas), options.weight_decay
    match options.optimizer:
        case "lion":
            return optimizers.Lion(options.lr, betas=betas, weight_decay=decay)
        case "adafactor":  # left to itself MLX's would ignore the learning rate, or multiply it by the weights' size
            return optimizers.Adafactor(options.lr, weight_decay=decay, relative_step=False, scale_parameter=False)
        case "prodigy":
            return Prodigy(options.betas, options.eps, decay)
    return optimizers.AdamW(options.lr, betas=betas, eps=options.eps, weight_decay=decay, bias_correction=True)


def advice(options: TrainOptions) -> str | None:
    """A sentence about a learning rate that this rule can hardly be meant to have."""
    if options.optimizer == "prodigy" and options.lr < 0.1:
        return (
            f"train.lr is {options.lr:g}: prodigy finds the step size itself and only multiplies it by train.lr, "
            "which is 1 as a rule"
        )
    return None


def moments(options: TrainOptions) -> int:
    """Adapter-sized arrays that the rule keeps between updates; Adafactor's are rows and columns, next to nothing."""
    return {"adamw": 2, "lion": 1, "adafactor": 0, "prodigy": 4}[options.optimizer]


def learning_rate(options: TrainOptions, step: int) -> float:
    """The learning rate of update `step` (from 0): a linear rise over `warmup` updates, then the schedule.

    The first update already moves; `linear` and `cosine` reach zero after the last one.
    """
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    match options.schedule:
        case "linear":
            return options.lr * max(0.0, 1 - done)
        case "cosine":
            return options.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return options.lr


def clip(gradients: Parameters, limit: float) -> tuple[Parameters, mx.array]:
    """Gradients scaled down to a global norm of `limit` where they exceed it (0: never), and their norm before.

    Source: torch `clip_grad_norm_`, 1e-6 in the denominator included.
    """
    norm = mx.sqrt(mx.sum(mx.stack([mx.sum(mx.square(value)) for value in gradients.values()])))
    if limit == 0:
        return gradients, norm
    factor = mx.minimum(limit / (norm + 1e-6), 1.0)
    return {name: value * factor for name, value in gradients.items()}, norm
