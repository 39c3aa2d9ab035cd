"""Prodigy: Adam that estimates its own step size from how far the parameters have come.

Source: Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", algorithm 4 (Adam
form), with the decoupled weight decay and, against float32's small numbers, the division of r and s by d0 of the
authors' own code. For a step with gradient g, learning rate lr and q = sqrt(beta2):

    r <- q r + (1 - q) (d / d0) lr d <g, x0 - x>          s <- q s + (1 - q) (d / d0) lr d g
    m <- beta1 m + (1 - beta1) d g                        v <- beta2 v + (1 - beta2) d^2 g^2
    x <- (1 - lr d decay) x - lr d m / (sqrt(v) + d eps)
    d <- max(d, r / |s|_1)

`lr` is a factor on the estimate, customarily 1.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import mlx.core as mx

FIRST_ESTIMATE = 1e-6
"""d0: far too small for anything, so that the estimate can only have to grow."""


class Prodigy:
    """The update rule with the interface of MLX's optimizers; all of it is float32."""

    def __init__(self, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """Nothing is known before `init`."""
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.learning_rate = mx.array(1.0)
        self.state: dict[str, Any] = {}

    def init(self, parameters: Mapping[str, mx.array]) -> None:
        """Fresh moments, the first estimate, and a note of where `parameters` start."""
        self.state = {"d": mx.array(FIRST_ESTIMATE), "r": mx.array(0.0)}
        for name, value in parameters.items():
            zero = mx.zeros_like(value)
            self.state[name] = {"start": mx.array(value), "m": zero, "v": zero, "s": zero}

    def apply_gradients(self, gradients: Mapping[str, mx.array], parameters: Mapping[str, mx.array]) -> dict:
        """The parameters after one update."""
        d, q = self.state["d"], self.betas[1] ** 0.5
        share = (1 - q) * (d / FIRST_ESTIMATE) * self.learning_rate * d
        way = _sum([mx.sum(g * (self.state[name]["start"] - parameters[name])) for name, g in gradients.items()])
        self.state["r"] = q * self.state["r"] + share * way
        updated = {name: self._update(self.state[name], g, parameters[name], share) for name, g in gradients.items()}
        size = _sum([mx.sum(mx.abs(self.state[name]["s"])) for name in gradients])
        estimate = mx.where(size > 0, self.state["r"] / mx.maximum(size, 1e-38), 0.0)  # no gradient yet: no estimate
        self.state["d"] = mx.maximum(d, estimate)
        return updated

    def _update(self, state: dict[str, mx.array], g: mx.array, x: mx.array, share: mx.array) -> mx.array:
        (beta1, beta2), d = self.betas, self.state["d"]
        state["s"] = beta2**0.5 * state["s"] + share * g
        state["m"] = beta1 * state["m"] + (1 - beta1) * d * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * mx.square(d * g)
        rate = self.learning_rate * d
        return (1 - rate * self.weight_decay) * x - rate * state["m"] / (mx.sqrt(state["v"]) + d * self.eps)


def _sum(values: list[mx.array]) -> mx.array:
    return reduce(mx.add, values)
