"""Loss and gradients of one step: all its passes, averaged."""

from dataclasses import dataclass

import mlx.core as mx

from flux2_relay.stages.train import lora, objective
from flux2_relay.stages.train.backprop import Gradients, loss_and_gradients
from flux2_relay.stages.train.batches import Draw, Loaded
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Terms:
    """What gradients depend on besides the transformer and the items."""

    seed: int
    options: TrainOptions
    dropout: float


def gradients_of(transformer: Transformer, loaded: Loaded, terms: Terms) -> tuple[mx.array, Gradients, list[float]]:
    """Loss and gradients averaged over the step's passes, and the sigma of every item; evaluated."""
    losses, sums, sigmas = [], {}, []
    for draws, batch in loaded.passes:
        loss, gradients, of_pass = _pass(transformer, draws, batch, loaded.step, terms)
        sums = {name: sums[name] + value if sums else value for name, value in gradients.items()}
        mx.eval(loss, sums)
        losses.append(loss)
        sigmas += of_pass
    count = len(loaded.passes)
    means = {name: value / count for name, value in sums.items()} if count > 1 else sums
    return mx.mean(mx.stack(losses)), means, sigmas


def _pass(
    transformer: Transformer, draws: list[Draw], batch: Batch, step: int, terms: Terms
) -> tuple[mx.array, Gradients, list[float]]:
    places, options = [drawn.place for drawn in draws], terms.options
    drawn = [objective.draw(terms.seed, step, place, batch.latents.shape[1:], options) for place in places]
    sigmas = [sigma for sigma, _ in drawn]
    guidance = mx.full((len(draws),), options.guidance) if transformer.spec.guidance else None
    loss, gradients = loss_and_gradients(
        lora.with_dropout(transformer, terms.dropout, terms.seed, step, places),
        batch,
        mx.array(sigmas, mx.float32),
        mx.stack([noise for _, noise in drawn]),
        guidance,
        options,
    )
    return loss, gradients, sigmas
