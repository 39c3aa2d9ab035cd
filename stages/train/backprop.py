"""Loss and adapter gradients, block by block.

The forward pass keeps nothing but the input of each block; the backward pass takes the blocks from the last to the
first, each time computing the block again and pulling the cotangent of its output through it. One forward and one
backward function a kind of block, compiled once, with weights and adapters as arguments. Work is dispatched at most
`AHEAD` blocks ahead: everything dispatched holds its memory until it has run.

The modulation depends on sigma and guidance alone, and only block linears carry adapters: it is a constant here.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train import blocks, objective
from flux2_relay.stages.train.blocks import Adapters, Rotary, Weights
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.transformer import DOUBLE, SINGLE, Modulation, Transformer

AHEAD = 2
"""Blocks whose work may be under way at once."""

Gradients = dict[str, mx.array]
Pair = tuple[mx.array, mx.array]


def loss_and_gradients(
    transformer: Transformer,
    batch: Batch | Mapping[str, mx.array],
    sigma: mx.array,
    noise: mx.array,
    guidance: mx.array | None,
    options: TrainOptions | None = None,
) -> tuple[mx.array, Gradients]:
    """Loss [] float32 and the gradient of every adapter weight, under the names of `lora.parameters`.

    sigma [B] in [0, 1], noise [B, L, 128] float32, guidance [B] or None. `options` gives the loss its weighting.
    """
    batch = Batch(**batch) if isinstance(batch, Mapping) else batch
    weight = mx.array(objective.loss_weight(np.asarray(sigma), options or TrainOptions()))
    run = _Run(
        transformer,
        transformer.modulation(sigma, guidance),
        transformer.rotary(batch.latent_ids, batch.text_ids),
    )
    noisy = objective.add_noise(batch.latents, noise, sigma)
    doubles, singles, hidden = run.forward(*transformer.embed(noisy, batch.context))
    text_rows = batch.context.shape[1]

    def head(hidden: mx.array) -> mx.array:
        velocity = blocks.output(hidden[:, text_rows:], run.modulation.final, transformer.outer, transformer.spec.eps)
        return objective.loss(velocity, batch.latents, noise, weight)

    loss, cotangent = mx.value_and_grad(head)(hidden)
    gradients = run.backward_single(singles, cotangent)
    text, image = mx.split(run.cotangent, [text_rows], axis=1)
    gradients |= run.backward_double(doubles, (image, text))
    return loss, gradients


class _Run:
    """One pass through the blocks of a transformer, and back."""

    def __init__(self, transformer: Transformer, modulation: Modulation, rotary: Rotary) -> None:
        self.transformer, self.modulation, self.rotary = transformer, modulation, rotary
        self.under_way: deque[Sequence[mx.array]] = deque()
        self.cotangent = mx.array(0.0)

    def forward(self, image: mx.array, text: mx.array) -> tuple[list[Pair], list[mx.array], mx.array]:
        """The inputs of all double blocks, of all single blocks, and the last output [B, T + L, D]."""
        model = self.transformer
        of_block = (self.modulation.image, self.modulation.text)
        doubles, singles = [], []
        run = self._compiled("double", _double(model))
        for index, weights in enumerate(model.double):
            doubles.append((image, text))
            image, text = run(weights, model.adapters_of(DOUBLE, index), (image, text), of_block, self.rotary)
            self._dispatch(image, text)
        hidden = mx.concatenate([text, image], axis=1)
        run = self._compiled("single", _single(model))
        for index, weights in enumerate(model.single):
            singles.append(hidden)
            hidden = run(weights, model.adapters_of(SINGLE, index), hidden, self.modulation.single, self.rotary)
            self._dispatch(hidden)
        return doubles, singles, hidden

    def backward_single(self, inputs: list[mx.array], cotangent: mx.array) -> Gradients:
        """Gradients of the single blocks' adapters; leaves the cotangent of their first input."""
        model, gradients = self.transformer, {}
        run = self._compiled("single backward", _backward(_single(model)))
        for index in reversed(range(len(inputs))):
            adapters = model.adapters_of(SINGLE, index)
            found, cotangent = run(
                model.single[index], adapters, inputs.pop(), self.modulation.single, self.rotary, cotangent
            )
            gradients |= _named(f"{SINGLE}.{index}", found)
            self._dispatch(cotangent, *_leaves(found))
        self.cotangent = cotangent
        return gradients

    def backward_double(self, inputs: list[Pair], cotangent: Pair) -> Gradients:
        """Gradients of the double blocks' adapters."""
        model, gradients = self.transformer, {}
        of_block = (self.modulation.image, self.modulation.text)
        run = self._compiled("double backward", _backward(_double(model)))
        for index in reversed(range(len(inputs))):
            adapters = model.adapters_of(DOUBLE, index)
            found, cotangent = run(model.double[index], adapters, inputs.pop(), of_block, self.rotary, cotangent)
            gradients |= _named(f"{DOUBLE}.{index}", found)
            # The first block's own cotangent is never asked for, so it is never computed.
            self._dispatch(*(cotangent if index else ()), *_leaves(found))
        return gradients

    def _compiled(self, name: str, function: Callable[..., object]) -> Callable:
        cache = self.transformer.compiled
        if name not in cache:
            cache[name] = mx.compile(function)
        return cache[name]

    def _dispatch(self, *arrays: mx.array) -> None:
        mx.async_eval(*arrays)
        self.under_way.append(arrays)
        if len(self.under_way) > AHEAD:
            mx.eval(*self.under_way.popleft())


def _double(model: Transformer) -> Callable:
    spec = model.spec

    def double(weights: Weights, adapters: Adapters, streams: Pair, modulation: Pair, rotary: Rotary) -> Pair:
        return blocks.double_block(weights, adapters, streams, modulation, rotary, spec)

    return double


def _single(model: Transformer) -> Callable:
    spec = model.spec

    def single(
        weights: Weights, adapters: Adapters, hidden: mx.array, modulation: mx.array, rotary: Rotary
    ) -> mx.array:
        return blocks.single_block(weights, adapters, hidden, modulation, rotary, spec)

    return single


def _backward(block: Callable) -> Callable:
    """The function that gives the gradients of a block's adapters and the cotangent of its input."""

    def backward(
        weights: Weights,
        adapters: Adapters,
        inputs: object,
        modulation: object,
        rotary: Rotary,
        cotangent: object,
    ) -> tuple[dict[str, Pair], object]:
        def scalar(factors: Mapping[str, Pair], inputs: object) -> mx.array:
            full = {name: (*factors[name], scale) for name, (_, _, scale) in adapters.items()}
            out = block(weights, full, inputs, modulation, rotary)
            # The derivative of <out, cotangent> is the pulled-back cotangent.
            if isinstance(out, tuple):
                return mx.sum(out[0] * cotangent[0]) + mx.sum(out[1] * cotangent[1])
            return mx.sum(out * cotangent)

        factors = {name: (a, b) for name, (a, b, _) in adapters.items()}
        return mx.grad(scalar, argnums=(0, 1))(factors, inputs)

    return backward


def _named(block: str, gradients: Mapping[str, Pair]) -> Gradients:
    named = {}
    for name, (a, b) in gradients.items():
        named |= {f"{block}.{name}.lora_A.weight": a, f"{block}.{name}.lora_B.weight": b}
    return named


def _leaves(gradients: Mapping[str, Pair]) -> list[mx.array]:
    return [factor for pair in gradients.values() for factor in pair]
