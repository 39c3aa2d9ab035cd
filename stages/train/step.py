"""Loss and gradients of one step: all its passes, averaged."""

from dataclasses import dataclass
from math import prod

import mlx.core as mx

from flux2_relay.stages.train import lora, objective, randomness, turns
from flux2_relay.stages.train.backprop import Gradients, in_turns
from flux2_relay.stages.train.batches import Draw, Loaded
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.transformer import Transformer
from flux2_relay.stages.train.turns import Way

Found = tuple[mx.array, Gradients, list[float]]
"""Loss, gradients, and the sigma of every item."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What gradients depend on besides the transformer and the items."""

    seed: int
    options: TrainOptions
    dropout: float


def gradients_of(transformer: Transformer, loaded: Loaded, terms: Terms) -> Found:
    """Loss and gradients averaged over the step's passes, and the sigma of every item; evaluated."""
    return turns.alone(gradients_in_turns(transformer, loaded, terms))


def gradients_in_turns(transformer: Transformer, loaded: Loaded, terms: Terms) -> Way[Found]:
    """`gradients_of` as a way through the blocks, its passes one behind the other."""
    losses, sums, sigmas = [], {}, []
    for number, (draws, batch) in enumerate(loaded.passes):
        way = _pass(transformer, draws, batch, loaded.step, terms)
        loss, gradients, of_pass = yield from turns.shifted(way, number * (2 * transformer.spec.blocks + 1))
        sums = {name: sums[name] + value if sums else value for name, value in gradients.items()}
        mx.eval(loss, sums)
        losses.append(loss)
        sigmas += of_pass
    count = len(loaded.passes)
    means = {name: value / count for name, value in sums.items()} if count > 1 else sums
    return mx.mean(mx.stack(losses)), means, sigmas


def sigmas_of(loaded: Loaded, terms: Terms) -> list[float]:
    """The sigma of every item of the step, those of other ranks' passes included."""
    return [
        objective.sigma_at(
            randomness.uniform(terms.seed, "sigma", loaded.step, drawn.place), prod(drawn.item.size), terms.options
        )
        for draws in loaded.whole
        for drawn in draws
    ]


def _pass(transformer: Transformer, draws: list[Draw], batch: Batch, step: int, terms: Terms) -> Way[Found]:
    places, options = [drawn.place for drawn in draws], terms.options
    drawn = [objective.draw(terms.seed, step, place, batch.latents.shape[1:], options) for place in places]
    sigmas = [sigma for sigma, _ in drawn]
    guidance = mx.full((len(draws),), options.guidance) if transformer.spec.guidance else None
    loss, gradients = yield from in_turns(
        lora.with_dropout(transformer, terms.dropout, terms.seed, step, places),
        batch,
        mx.array(sigmas, mx.float32),
        mx.stack([noise for _, noise in drawn]),
        guidance,
        options,
    )
    return loss, gradients, sigmas
