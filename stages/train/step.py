"""Loss and gradients of one step: all its passes, averaged; of several runs over one base together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx

from flux2_relay.stages.train import beside, lora, objective, randomness, turns
from flux2_relay.stages.train.backprop import Given, Gradients, side_by_side
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


@dataclass(frozen=True, slots=True)
class Asked:
    """The step of one run."""

    transformer: Transformer
    loaded: Loaded
    terms: Terms


def gradients_of(transformer: Transformer, loaded: Loaded, terms: Terms) -> Found:
    """Loss and gradients averaged over the step's passes, and the sigma of every item; evaluated."""
    return gradients_together([Asked(transformer, loaded, terms)])[0]


def gradients_together(steps: Sequence[Asked]) -> list[Found]:
    """`gradients_of` for a step of each of several runs, block by block: the nth passes of all, then the next ones.

    Passes of one bucket go through the blocks as one batch where the transformer `joins` them, else in turns.
    """
    means, ways = [_Mean() for _ in steps], []
    for number in range(max(len(step.loaded.passes) for step in steps)):
        begins = number * (2 * steps[0].transformer.spec.blocks + 1)
        for members in _groups(steps, number):
            way = _pass([steps[n] for n in members], number, [means[n] for n in members])
            ways.append(turns.shifted(way, begins))
    turns.together(ways)
    return [mean.found() for mean in means]


def _groups(steps: Sequence[Asked], number: int) -> Iterator[list[int]]:
    """The steps that have a pass `number`, those together that can be joined in it."""
    groups: dict[object, list[int]] = {}
    for place, step in enumerate(steps):
        if number < len(step.loaded.passes):
            draws, batch = step.loaded.passes[number]
            alike = len(draws), draws[0].item.bucket, batch.context.shape
            joins = step.transformer.joins and not step.terms.dropout and beside.are_joinable(step.transformer)
            groups.setdefault(alike if joins else place, []).append(place)
    yield from groups.values()


@dataclass(slots=True)
class _Mean:
    """What a step's passes found so far."""

    losses: list[mx.array] = field(default_factory=list)
    sums: Gradients = field(default_factory=dict)
    sigmas: list[float] = field(default_factory=list)

    def add(self, loss: mx.array, gradients: Gradients, sigmas: list[float]) -> None:
        """One more pass."""
        self.sums = {name: self.sums[name] + value if self.sums else value for name, value in gradients.items()}
        mx.eval(loss, self.sums)
        self.losses.append(loss)
        self.sigmas += sigmas

    def found(self) -> Found:
        """Averaged over the passes."""
        count = len(self.losses)
        means = {name: value / count for name, value in self.sums.items()} if count > 1 else self.sums
        return mx.mean(mx.stack(self.losses)), means, self.sigmas


def sigmas_of(loaded: Loaded, terms: Terms) -> list[float]:
    """The sigma of every item of the step, those of other ranks' passes included."""
    return [
        objective.sigma_at(
            randomness.uniform(terms.seed, "sigma", loaded.step, drawn.place), prod(drawn.item.size), terms.options
        )
        for draws in loaded.whole
        for drawn in draws
    ]


def _pass(steps: Sequence[Asked], number: int, means: Sequence[_Mean]) -> Way[None]:
    """Pass `number` of each of these steps as one; what each finds is added to its mean."""
    drawn = [_draw(step, *step.loaded.passes[number]) for step in steps]
    givens = [given for given, _ in drawn]
    if len(steps) == 1:
        losses, gradients = yield from side_by_side(_dropping(steps[0], number), givens)
        found = [gradients]
    else:
        runs = [step.transformer for step in steps]
        losses, gradients = yield from side_by_side(beside.joined_runs(runs), givens)
        found = beside.parted(gradients, [lora.parameters(run) for run in runs])
    for mean, loss, of_run, (_, sigmas) in zip(means, losses, found, drawn, strict=True):
        mean.add(loss, of_run, sigmas)


def _draw(step: Asked, draws: list[Draw], batch: Batch) -> tuple[Given, list[float]]:
    """What a pass goes through the blocks with, and its sigmas."""
    terms, number = step.terms, step.loaded.step
    drawn = [objective.draw(terms.seed, number, d.place, batch.latents.shape[1:], terms.options) for d in draws]
    sigmas = [sigma for sigma, _ in drawn]
    noise = mx.stack([noise for _, noise in drawn])
    guidance = mx.full((len(draws),), terms.options.guidance) if step.transformer.spec.guidance else None
    return Given(batch, mx.array(sigmas, mx.float32), noise, guidance, terms.options), sigmas


def _dropping(step: Asked, number: int) -> Transformer:
    """The run's transformer, its adapters with the masks of a pass."""
    places = [drawn.place for drawn in step.loaded.passes[number][0]]
    return lora.with_dropout(step.transformer, step.terms.dropout, step.terms.seed, step.loaded.step, places)
