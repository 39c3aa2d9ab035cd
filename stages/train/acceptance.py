"""The acceptance test: whether the store holds what this transformer was trained on.

From the store alone, before anything is trained. A wrong latent space, sign, timestep scale or text encoder shows in
the loss at fixed sigmas: whoever predicts nothing pays 1 + v, v the mean square of the latents (about 1), and whoever
knows no more than that v/(s^2 + (1-s)^2 v) at sigma s. A trained model uses structure and pays less on average; where
one does not, the same loss is taken under the usual mistakes, and one that explains it is named.

Letters: B batch, L image tokens, T text rows, C channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train import objective, randomness
from flux2_relay.stages.train.batches import Draw, Item, items, load_ahead
from flux2_relay.stages.train.contexts import Contexts, to_mlx
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.transformer import Transformer

Level = Literal["yes", "unsure", "no"]

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHORT_SIGMAS = (0.1, 0.5, 0.9)
ITEMS, SHORT_ITEMS = 8, 2
_UNIT = (0.5, 2.0)  # the standard deviation of latents that went through the VAE's own statistics
_CENTRE = 0.5  # the largest mean of theirs, by the median over channels
_NARROW = 0.95  # of the bound: a loss between this and 1 proves little
_EXPLAINS = 0.9  # of the bound: a mistake whose loss is below explains one above it
_LOWER = 0.01  # share of the loss by which other captions must be better for its own to mislead
_HELP = 0.001  # share of the loss that a picture's own captions must save to be of use


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    about: str
    level: Level
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The loss of the base at each sigma, over all items, and what it is measured by."""

    sigmas: tuple[float, ...]
    base: tuple[float, ...]
    bound: tuple[float, ...]
    """Of a predictor that knows mean and variance alone."""
    nothing: float
    """Of predicting zero."""

    @property
    def share(self) -> float:
        """Mean loss over the mean bound: below 1 is a trained model."""
        return fmean(self.base) / fmean(self.bound)


class Chosen:
    """A handful of a set's pictures, a pass each, the same ones every time."""

    prior_weight = 1.0

    def __init__(self, body: Mapping[str, Any], count: int) -> None:
        """`count` of them at most, each with the first of its captions."""
        alike = {item.id: item for item in reversed(list(items(body)))}  # one crop of each picture
        order = sorted(alike.values(), key=lambda item: randomness.number("acceptance", item.id))
        self.items: Sequence[Item] = order[:count]

    def at(self, step: int) -> list[list[Draw]]:
        """Picture number `step`, alone."""
        return [[Draw(0, self.items[step], self.items[step].captions[0])]]

    def batches(self, contexts: Contexts) -> Iterator[Batch]:
        """Each picture as a batch of one."""
        for loaded in load_ahead(self, contexts.store, contexts, 0, len(self.items)):
            ((_, batch),) = loaded.passes
            yield batch


def verdict(findings: Sequence[Finding]) -> Level:
    """The worst of them."""
    levels = {finding.level for finding in findings}
    return "no" if "no" in levels else "unsure" if "unsure" in levels else "yes"


def look_at_store(contexts: Contexts, chosen: Chosen, width: int) -> list[Finding]:
    """What can be told without the transformer: contexts and latents of the chosen pictures."""
    captions = list(dict.fromkeys(item.captions[0] for item in chosen.items))
    of_text = [np.array(contexts.context(key).astype(mx.float32)) for key in captions]
    stored = [to_mlx(contexts.store.read("latents", item.latents)).astype(mx.float32) for item in chosen.items]
    return [*_look_at_text(of_text, contexts.length, width), *_look_at_latents([np.array(one) for one in stored])]


def _look_at_text(texts: Sequence[np.ndarray], rows: int, width: int) -> Iterator[Finding]:
    shapes = {text.shape for text in texts}
    if shapes != {(rows, width)}:
        yield Finding("text", "no", f"contexts are {shapes}, not the {rows} rows x {width} channels that it reads")
    elif not all(np.isfinite(text).all() for text in texts):
        yield Finding("text", "no", "contexts hold values that are not finite; encode again")
    elif not all(text.std() for text in texts):
        yield Finding("text", "no", "a context is one number throughout: the text encoder did not compute anything")
    elif len(texts) > 1 and all(np.array_equal(text, texts[0]) for text in texts[1:]):
        yield Finding("text", "no", f"the contexts of {len(texts)} different captions are all equal")
    else:
        yield Finding("text", "yes", f"{len(texts)} contexts of {rows} rows x {width} channels, finite and different")


def _look_at_latents(latents: Sequence[np.ndarray]) -> Iterator[Finding]:
    rows = np.concatenate([one.reshape(-1, one.shape[-1]) for one in latents])
    if not np.isfinite(rows).all():
        yield Finding("latents", "no", "latents hold values that are not finite; encode again")
        return
    deviations, means = rows.std(axis=0), rows.mean(axis=0)
    low, high = _UNIT
    usual, centre = float(np.median(deviations)), float(np.median(np.abs(means)))
    outside = int(((deviations < low) | (deviations > high)).sum())
    said = (
        f"standard deviation {usual:.2f}, mean {centre:.2f} off zero (medians over {rows.shape[1]} channels; "
        f"{outside} of them outside {low:g} to {high:g})"
    )
    if not low <= usual <= high or centre > _CENTRE:
        why = "latents of this model are about unit scale: another VAE, or its batch-norm statistics were not applied"
        yield Finding("latents", "no", f"{said}; {why}")
    elif outside > rows.shape[1] // 2:
        yield Finding("latents", "unsure", f"{said}; these pictures are very much alike, or the VAE is another one")
    else:
        yield Finding("latents", "yes", said)


Predict = Callable[[Batch, float, mx.array], mx.array]
"""(batch, sigma, noise) -> velocity [B, L, C]."""


@dataclass(frozen=True, slots=True)
class Examiner:
    """Takes losses of a base without adapters, at fixed sigmas with fixed noise."""

    transformer: Transformer
    chosen: Chosen
    contexts: Contexts
    guidance: float
    progress: Callable[[], object] = lambda: None

    def velocity(self, batch: Batch, sigma: float, noise: mx.array, told: float | None = None) -> mx.array:
        """The model's velocity [B, L, C] at `sigma`, of which it is `told` something else where that is given."""
        at = mx.full((batch.latents.shape[0],), sigma)
        tokens, ids = batch.with_references(objective.add_noise(batch.latents, noise, at))
        model = self.transformer
        guidance = mx.full(at.shape, self.guidance) if model.spec.guidance else None
        running = replace(model, run=model.pieces)
        said = at if told is None else mx.full(at.shape, told)
        velocity = running(tokens, batch.context, said, guidance, ids, batch.text_ids)[:, : batch.latents.shape[1]]
        mx.eval(velocity)
        model.pieces.settle()
        self.progress()
        return velocity.astype(mx.float32)

    def noise(self, item: Item, sigma: float, shape: Sequence[int]) -> mx.array:
        """Fixed noise for an item at a sigma."""
        key = randomness.key("acceptance", item.latents, str(sigma))
        return mx.random.normal(tuple(shape), key=key)

    def losses(self, sigmas: Sequence[float]) -> Losses:
        """The loss of every chosen picture at every sigma."""
        found, squares = np.zeros((len(self.chosen.items), len(sigmas))), []
        for row, (item, batch) in enumerate(self._each()):
            squares.append(float(mx.mean(batch.latents**2)))
            for column, sigma in enumerate(sigmas):
                noise = self.noise(item, sigma, batch.latents.shape)
                found[row, column] = error(self.velocity(batch, sigma, noise), batch, noise)
        square = fmean(squares)
        return Losses(
            sigmas=tuple(sigmas),
            base=tuple(map(float, found.mean(axis=0))),
            bound=tuple(bound(sigma, square) for sigma in sigmas),
            nothing=1 + square,
        )

    def _each(self) -> Iterator[tuple[Item, Batch]]:
        return zip(self.chosen.items, self.chosen.batches(self.contexts), strict=True)

    def diagnose(self, losses: Losses) -> str:
        """Which usual mistake explains a loss that is too high."""
        found = {name: self._loss_under(predict) for name, predict in _MISTAKES.items()}
        # The loss under another scale of the latents is one of latents at unit scale.
        squares = {name: 1.0 if predict is _rescaled else losses.nothing - 1 for name, predict in _MISTAKES.items()}
        limits = {name: fmean(bound(s, square) for s in SHORT_SIGMAS) for name, square in squares.items()}
        name = min(found, key=lambda one: found[one] / limits[one])
        if found[name] < _EXPLAINS * limits[name]:
            return f"{name}: with that put right the mean loss is {found[name]:.3f}"
        if fmean(losses.base) > 0.95 * losses.nothing:
            return (
                "it predicts no better than nothing, under no usual mistake either: weights that were never trained "
                "or are damaged, or a transformer and a VAE of two models"
            )
        return "no single usual mistake explains it: a VAE or a text encoder of another model or damaged weights"

    def _loss_under(self, predict: "Mistake") -> float:
        """The mean loss at the short form's sigmas, over the first few pictures."""
        found = []
        for item, batch in list(self._each())[:SHORT_ITEMS]:
            for sigma in SHORT_SIGMAS:
                noise = self.noise(item, sigma, batch.latents.shape)
                found.append(error(predict(self, batch, sigma, noise), batch, noise))
        return fmean(found) if all(map(math.isfinite, found)) else math.inf

    def look_at_captions(self) -> Finding:
        """Whether the loss is lower under the captions of other pictures."""
        captions = [item.captions[0] for item in self.chosen.items]
        others = _other_captions(captions)
        gains, own_losses = [], []
        for row, (item, batch) in enumerate(self._each()):
            if others[row] == captions[row]:
                continue
            swapped = replace(batch, context=self.contexts.context(others[row])[None])
            own, other = 0.0, 0.0
            for sigma in SHORT_SIGMAS:
                noise = self.noise(item, sigma, batch.latents.shape)
                own += error(self.velocity(batch, sigma, noise), batch, noise) / len(SHORT_SIGMAS)
                other += error(self.velocity(swapped, sigma, noise), swapped, noise) / len(SHORT_SIGMAS)
            gains.append(other - own)
            own_losses.append(own)
        return _judge_captions(gains, own_losses)


Mistake = Callable[[Examiner, Batch, float, mx.array], mx.array]


def _channels(first: int, examiner: Examiner, batch: Batch, sigma: float, noise: mx.array) -> mx.array:
    """Latents with (2 x 2, c) in their channels for (c, 2 x 2), or conversely: turned, predicted, put back."""
    other = replace(batch, latents=_turned(batch.latents, first))
    return _turned(examiner.velocity(other, sigma, _turned(noise, first)), batch.latents.shape[-1] // first)


def _turned(values: mx.array, first: int) -> mx.array:
    *rest, channels = values.shape
    return values.reshape(*rest, first, channels // first).swapaxes(-1, -2).reshape(values.shape)


def _rescaled(examiner: Examiner, batch: Batch, sigma: float, noise: mx.array) -> mx.array:
    """Latents brought to unit scale; the prediction is of noise minus those, and corrected for the difference."""
    mean, deviation = mx.mean(batch.latents), mx.std(batch.latents) + 1e-6
    unit = (batch.latents - mean) / deviation
    return examiner.velocity(replace(batch, latents=unit), sigma, noise) + unit - batch.latents


def _without_text(examiner: Examiner, batch: Batch, sigma: float, noise: mx.array) -> mx.array:
    empty = examiner.contexts.context(examiner.contexts.empty)[None]
    return examiner.velocity(replace(batch, context=empty), sigma, noise)


_MISTAKES: Mapping[str, Mistake] = {
    "the sign of the velocity is turned": lambda e, batch, s, noise: -e.velocity(batch, s, noise),
    "time runs the other way (sigma told as 1 - sigma)": lambda e, batch, s, noise: e.velocity(batch, s, noise, 1 - s),
    "timestep scale: it wants sigma x 1000": lambda e, batch, s, noise: e.velocity(batch, s, noise, 1000 * s),
    "timestep scale: it wants sigma / 1000": lambda e, batch, s, noise: e.velocity(batch, s, noise, s / 1000),
    "latent space: the channels of the latents stand in another order, (2 x 2, c)": partial(_channels, 4),
    "latent space: the channels of the latents stand in another order, (c, 2 x 2)": partial(_channels, 32),
    "latent space: the latents are not at unit scale (VAE statistics not applied, or another VAE)": _rescaled,
    "text: the captions' contexts mislead it (another text encoder, template or layers)": _without_text,
}


def bound(sigma: float, square: float) -> float:
    """The loss at `sigma` of the best predictor that knows of the latents only their mean square."""
    return square / (sigma**2 + (1 - sigma) ** 2 * square)


def error(velocity: mx.array, batch: Batch, noise: mx.array) -> float:
    """Mean squared error of a velocity [B, L, C], unweighted and unmasked."""
    return float(objective.loss(velocity, batch.latents, noise, mx.ones(velocity.shape[0])))


def _other_captions(captions: Sequence[str]) -> list[str]:
    """For each caption the next one that differs; itself where all are the same."""
    count = len(captions)
    return [
        next((c for c in (captions[(n + k) % count] for k in range(1, count)) if c != captions[n]), captions[n])
        for n in range(count)
    ]


def _judge_captions(gains: Sequence[float], losses: Sequence[float]) -> Finding:
    if not gains:
        return Finding("captions", "unsure", "all pictures that were looked at have the same caption: cannot be told")
    gain, loss = fmean(gains), fmean(losses)
    doubt = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else abs(gain)
    said = f"other pictures' captions cost {gain / loss:+.2%} of the loss"
    if gain < -_LOWER * loss and gain < -2 * doubt:
        why = "its own captions mislead the model: another text encoder, template or layers than it was trained with"
        return Finding("captions", "no", f"{said}: {why}")
    if gain < _HELP * loss:
        why = "its own are of next to no use to it; do they fit the pictures?"
        return Finding("captions", "unsure", f"{said}: {why}")
    return Finding("captions", "yes", f"{said}: its own help")


def judge(losses: Losses, diagnose: Callable[[Losses], str]) -> Finding:
    """The finding about the loss of the base; `diagnose` is asked only where it is too high."""
    at = ", ".join(f"{loss:.2f} at {sigma:g}" for sigma, loss in zip(losses.sigmas, losses.base, strict=True))
    base, limit = fmean(losses.base), fmean(losses.bound)
    said = f"loss of the base {base:.3f} ({at}); spread alone costs {limit:.3f}, nothing {losses.nothing:.2f}"
    if not math.isfinite(base):
        return Finding("loss", "no", f"{said}: the model's output is not finite; damaged weights, or too few bits")
    if losses.share >= 1:
        return Finding("loss", "no", f"{said}; {diagnose(losses)}")
    if losses.share >= _NARROW:
        return Finding("loss", "unsure", f"{said}: it uses next to no structure of the pictures")
    return Finding("loss", "yes", f"{said}: a trained model on its own latents")


def short(transformer: Transformer, body: Mapping[str, Any], contexts: Contexts, guidance: float) -> list[Finding]:
    """The short form before a training: a few passes; what is not worth a warning is in there too."""
    chosen = Chosen(body, SHORT_ITEMS)
    if not chosen.items:
        return []
    examiner = Examiner(transformer, chosen, contexts, guidance)
    found = look_at_store(contexts, chosen, transformer.spec.context_width)
    return [*found, judge(examiner.losses(SHORT_SIGMAS), lambda losses: "`relay check` looks for the cause")]
