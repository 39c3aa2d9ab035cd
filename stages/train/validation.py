"""The loss on pictures that are held out, at fixed sigmas with fixed noise: what changes between two is the adapter.

Whether a picture is held out depends on its id alone, so pictures that come later move none from one side to the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.train import objective, randomness
from flux2_relay.stages.train.batches import Draw, Item, items, load_ahead
from flux2_relay.stages.train.contexts import Contexts
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.transformer import Transformer

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
MOST = 16
"""Pictures whose loss is taken; at five sigmas each that is the time of some thirty steps of training."""

Body = Mapping[str, Any]


def split(body: Body, fraction: float) -> tuple[Body, Body]:
    """A set's body as two: what is trained on, and the share `fraction` that is held out, at least one picture.

    Prior pictures are never held out: they are no part of what is to be learned.
    """
    if not fraction:
        return body, {**body, "samples": []}
    numbers = {sample["id"]: _number(sample) for sample in body["samples"] if not sample["prior"]}
    first = sorted(numbers, key=lambda name: numbers[name])[:1]
    held = {name for name, number in numbers.items() if number < fraction} or set(first)
    trained = [sample for sample in body["samples"] if sample["id"] not in held]
    if not trained:
        raise InputError(
            f"validation.fraction: {fraction:g} holds out every picture of the data set ({len(held)}); nothing would "
            "be trained on. A smaller share, or more pictures, will do."
        )
    return {**body, "samples": trained}, {**body, "samples": [s for s in body["samples"] if s["id"] in held]}


def _number(sample: Body) -> float:
    return randomness.uniform("held out", sample["id"])


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean loss of the held-out pictures, over all sigmas and at each."""

    mean: float
    by_sigma: tuple[float, ...]
    pictures: int

    def line(self, step: int) -> dict[str, object]:
        """As a line of `validation.jsonl`."""
        return {
            "step": step,
            "loss": _number_or_null(self.mean),
            "sigma": list(SIGMAS),
            "loss_by_sigma": [_number_or_null(loss) for loss in self.by_sigma],
            "pictures": self.pictures,
        }


def _number_or_null(value: float) -> float | None:
    return value if abs(value) < float("inf") else None  # JSON has no NaN


class Validation:
    """The held-out pictures of a run, a pass each; read ahead like those of training."""

    prior_weight = 1.0

    def __init__(self, body: Body, contexts: Contexts, seed: int, guidance: float) -> None:
        """From the held-out part of a set."""
        chosen = sorted(dict.fromkeys(items(body)), key=lambda item: randomness.number("order", item.id, item.latents))
        self._items: Sequence[Item] = chosen[:MOST]
        self._contexts, self._seed, self._guidance = contexts, seed, guidance

    def __bool__(self) -> bool:
        """Whether anything is held out."""
        return bool(self._items)

    def at(self, step: int) -> list[list[Draw]]:
        """Picture number `step`, alone, with the first of its captions."""
        item = self._items[step]
        return [[Draw(0, item, item.captions[0])]]

    def loss(self, transformer: Transformer) -> HeldOutLoss:
        """The loss of every held-out picture at every sigma."""
        rows = []
        for loaded in load_ahead(self, self._contexts.store, self._contexts, 0, len(self._items)):
            ((draws, batch),) = loaded.passes
            rows.append([self._loss_at(transformer, batch, draws[0].item, place) for place in range(len(SIGMAS))])
        by_sigma = tuple(sum(row[place] for row in rows) / len(rows) for place in range(len(SIGMAS)))
        return HeldOutLoss(sum(by_sigma) / len(by_sigma), by_sigma, len(rows))

    def _loss_at(self, transformer: Transformer, batch: Batch, item: Item, place: int) -> float:
        key = randomness.key(self._seed, "validation", item.latents, place)
        noise = mx.random.normal(batch.latents.shape, key=key)
        guidance = mx.full((1,), self._guidance) if transformer.spec.guidance else None
        return loss_alone(transformer, batch, mx.array([SIGMAS[place]], mx.float32), noise, guidance)


def loss_alone(
    transformer: Transformer, batch: Batch, sigma: mx.array, noise: mx.array, guidance: mx.array | None
) -> float:
    """The unweighted loss of a batch, without gradients; arguments as of `backprop.loss_and_gradients`."""
    tokens, ids = batch.with_references(objective.add_noise(batch.latents, noise, sigma))
    running = replace(transformer, run=transformer.pieces)
    velocity = running(tokens, batch.context, sigma, guidance, ids, batch.text_ids)[:, : batch.latents.shape[1]]
    loss = objective.loss(velocity, batch.latents, noise, mx.ones_like(sigma), batch.mask)
    mx.eval(loss)
    transformer.pieces.settle()
    return float(loss)
