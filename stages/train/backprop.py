"""Loss and adapter gradients, block by block.

The forward pass keeps the input of each block, and of the last `keep` blocks also their wide projections; the backward
pass takes the blocks from the last to the first (`backward.py`), as far as adapters go.

The modulation depends on sigma and guidance alone, and only block linears carry adapters: it is a constant here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train import blocks, objective, turns
from flux2_relay.stages.train.backward import Backward
from flux2_relay.stages.train.blocks import KeptDouble
from flux2_relay.stages.train.cuts import joined, split
from flux2_relay.stages.train.embeddings import Rotary
from flux2_relay.stages.train.kinds import Named
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.pieces import Pieces
from flux2_relay.stages.train.transformer import Modulation, Transformer, block_path
from flux2_relay.stages.train.turns import Way

Gradients = dict[str, mx.array]


def loss_and_gradients(
    transformer: Transformer,
    batch: Batch | Mapping[str, mx.array],
    sigma: mx.array,
    noise: mx.array,
    guidance: mx.array | None,
    options: TrainOptions | None = None,
) -> tuple[mx.array, Gradients]:
    """Loss [] float32 and the gradient of every adapter weight, under the names of `lora.parameters`.

    sigma [B] in [0, 1], noise [B, L, 128] float32, guidance [B] or None. `options` gives the loss its weighting. A
    mapping holds the fields of `Batch`; references, reference_ids, mask and item_weight only where they are used.
    """
    batch = Batch(**batch) if isinstance(batch, Mapping) else batch
    given = Given(batch, sigma, noise, guidance, options or TrainOptions())
    (loss,), gradients = turns.alone(side_by_side(transformer, [given]))
    return loss, gradients


@dataclass(frozen=True, slots=True)
class Given:
    """What a pass goes through the blocks with; arguments of `loss_and_gradients`."""

    batch: Batch
    sigma: mx.array
    noise: mx.array
    guidance: mx.array | None
    options: TrainOptions

    def inputs(self) -> tuple[mx.array, mx.array]:
        """Noisy tokens [B, L, 128] and their position ids, those of the references behind them."""
        return self.batch.with_references(objective.add_noise(self.batch.latents, self.noise, self.sigma))

    def loss(self, velocity: mx.array) -> mx.array:
        """What is asked of a velocity [B, L, 128]."""
        weight = mx.array(objective.loss_weight(np.asarray(self.sigma), self.options))
        weight = weight if self.batch.item_weight is None else weight * self.batch.item_weight
        return objective.loss(velocity, self.batch.latents, self.noise, weight, self.batch.mask)


def side_by_side(transformer: Transformer, passes: Sequence[Given]) -> Way[tuple[list[mx.array], Gradients]]:
    """Passes of one bucket as one batch -> the loss of each, and the gradients of their sum.

    A way through the blocks: 0 before them, 1 … blocks forward, the next numbers back.
    """
    yield 0
    tokens, ids = zip(*(one.inputs() for one in passes), strict=True)
    context = [one.batch.context for one in passes]
    guidance = [one.guidance for one in passes if one.guidance is not None]
    modulation = transformer.modulation(
        joined([one.sigma for one in passes], axis=0), joined(guidance, axis=0) if guidance else None
    )
    run = _Pass(transformer, modulation, transformer.rotary(ids[0], passes[0].batch.text_ids), transformer.pieces)
    hidden = yield from run.forward(*transformer.embed(joined(tokens, axis=0), joined(context, axis=0)))
    text_rows, rows = context[0].shape[1], passes[0].batch.latents.shape[1]

    def head(hidden: mx.array) -> tuple[mx.array, list[mx.array]]:
        velocity = transformer.output(hidden[:, text_rows : text_rows + rows], modulation)  # references left out
        parts = split(velocity, len(passes), axis=0) if len(passes) > 1 else [velocity]
        losses = [one.loss(part) for one, part in zip(passes, parts, strict=True)]
        return sum(losses[1:], losses[0]), losses

    (_, losses), cotangent = mx.value_and_grad(head)(hidden)
    gradients = yield from run.backward(cotangent, text_rows)
    transformer.pieces.settle()
    return losses, gradients


class _Pass:
    """One pass through the blocks, and back as far as adapters go."""

    def __init__(self, transformer: Transformer, modulation: Modulation, rotary: Rotary, pieces: Pieces) -> None:
        self.transformer, self.modulation, self.rotary, self.pieces = transformer, modulation, rotary, pieces
        self.first = first_trained(transformer)
        self.doubles: list[tuple[list[mx.array], KeptDouble | None]] = []
        self.singles: list[tuple[mx.array, mx.array | None]] = []

    def forward(self, text: mx.array, image: mx.array) -> Way[mx.array]:
        """The stream [B, T + L, D] behind the last block; every block's input is noted."""
        model, spec = self.transformer, self.transformer.spec
        first_kept = spec.blocks - model.keep
        model.residence.announce([*range(spec.blocks), *reversed(range(self.first, spec.blocks))])
        streams = [text, image]
        for place in range(spec.double_blocks):
            yield 1 + place
            block = model.block(place)
            following, kept = blocks.double_forward(self.pieces, block, streams, self.modulation.double, self.rotary)
            self.doubles.append((streams, kept if place >= first_kept else None))
            streams = following
            del kept, block  # not to be held beside the next block's
        hidden = mx.concatenate(streams, axis=1)
        for place in range(spec.double_blocks, spec.blocks):
            yield 1 + place
            block = model.block(place)
            following, wide = blocks.single_forward(self.pieces, block, hidden, self.modulation.single, self.rotary)
            self.singles.append((hidden, wide if place >= first_kept else None))
            hidden = following
            del wide, block
        return hidden

    def backward(self, cotangent: mx.array, text_rows: int) -> Way[Gradients]:
        """Gradients of all adapters; the passage stops at the first block that has one."""
        model, spec, gradients = self.transformer, self.transformer.spec, {}
        backward = Backward(self.pieces, self.rotary, model.attention_heads)
        for place in reversed(range(max(self.first, spec.double_blocks), spec.blocks)):
            yield 2 * spec.blocks - place
            hidden, wide = self.singles.pop()
            found, pulled = backward.single(
                model.block(place), hidden, wide, self.modulation.single, cotangent, place > self.first
            )
            gradients |= _named(block_path(spec, place), found)
            cotangent = cotangent if pulled is None else pulled
        cotangents = blocks.split(cotangent, [text_rows], axis=1)
        for place in reversed(range(self.first, spec.double_blocks)):
            yield 2 * spec.blocks - place
            streams, kept = self.doubles.pop()
            found, pulled = backward.double(
                model.block(place), streams, kept, self.modulation.double, cotangents, place > self.first
            )
            gradients |= _named(block_path(spec, place), found)
            cotangents = [g for g in pulled if g is not None] or cotangents
        return gradients


def first_trained(transformer: Transformer) -> int:
    """The place of the first block that has an adapter; behind the last block where none has."""
    paths = [block_path(transformer.spec, place) + "." for place in range(transformer.spec.blocks)]
    trained = (place for place, path in enumerate(paths) if any(name.startswith(path) for name in transformer.adapters))
    return next(trained, transformer.spec.blocks)


def _named(block: str, gradients: Mapping[str, Named]) -> Gradients:
    return {f"{block}.{name}.{what}": value for name, found in gradients.items() for what, value in found.items()}
