"""The acceptance test on a model that is known to be perfect: each way to be wrong is named, what is right passes.

The model is the best predictor there is of pictures of one colour: latents equal in all rows, of unit variance.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import ours

from flux2_relay import cache
from flux2_relay.stages.train import acceptance, objective, trial
from flux2_relay.stages.train.acceptance import SIGMAS, Chosen, Examiner, Finding, verdict
from flux2_relay.stages.train.batches import Item
from flux2_relay.stages.train.contexts import open_contexts
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.transformer import image_ids, text_ids

ROWS, TEXT = 64, 4
Seen = Callable[[Batch], Batch]


class Pictures(Chosen):
    """Eight pictures of one colour each; the context names the picture."""

    def __init__(self, change: Seen = lambda batch: batch) -> None:
        self.items = [Item(f"{n}.png", f"l{n}", (8, 8), (f"c{n}",)) for n in range(8)]
        self._change = change

    def batches(self, contexts: object) -> Iterator[Batch]:
        for number in range(len(self.items)):
            colour = mx.random.normal((1, 1, 128), key=mx.random.key(number))
            yield self._change(
                Batch(
                    latents=mx.broadcast_to(colour, (1, ROWS, 128)),
                    context=mx.full((1, TEXT, 8), float(number)),
                    latent_ids=image_ids(8, 8),
                    text_ids=text_ids(TEXT),
                )
            )


class Texts:
    """Contexts by key."""

    empty = "c-1"
    length = TEXT

    def context(self, key: str) -> mx.array:
        return mx.full((TEXT, 8), float(key[1:]))


def told_of(batch: Batch) -> int:
    """The number of the picture that a context names."""
    return int(np.asarray(batch.context)[0, 0, 0])


@dataclass(frozen=True)
class Perfect(Examiner):
    """Examines the best predictor, looked at through a mistake."""

    mistake: str = ""

    def velocity(self, batch: Batch, sigma: float, noise: mx.array, told: float | None = None) -> mx.array:
        at = mx.full((1,), sigma)
        x = objective.add_noise(batch.latents, noise, at)
        s = sigma if told is None else told
        match self.mistake:
            case "time":
                s = 1 - s
            case "thousands":
                s = s / 1000
            case "thousandths":
                s = s * 1000
            case "sign":
                return -self.best(x, batch, s)
        return self.best(x, batch, s)

    def best(self, x: mx.array, batch: Batch, s: float) -> mx.array:
        if self.mistake == "untrained":
            return mx.random.normal(x.shape, key=mx.random.key(99)) * 0.5
        mean = mx.mean(x, axis=1, keepdims=True)
        data = mean * (1 - s) / ((1 - s) ** 2 + s**2 / ROWS)
        if self.mistake == "text" and told_of(batch) >= 0:
            data = data + 3.0
        if self.mistake == "uses text":  # a caption that is not this picture's misleads it
            own = mx.random.normal((1, 1, 128), key=mx.random.key(told_of(batch)))
            data = data + 0.1 * (own - data)
        noise = (x - (1 - s) * data) / max(s, 1e-3)
        return noise - data


def examiner(mistake: str = "", change: Seen = lambda batch: batch) -> Perfect:
    return Perfect(None, Pictures(change), Texts(), 1.0, mistake=mistake)  # pyright: ignore[reportArgumentType]


def judged(of: Perfect) -> Finding:
    return acceptance.judge(of.losses(SIGMAS), of.diagnose)


def test_the_bounds_are_those_of_knowing_the_spread_and_of_knowing_nothing() -> None:
    assert [acceptance.bound(sigma, 1.0) for sigma in (0.0, 0.5, 1.0)] == [1.0, 2.0, 1.0]
    sigmas = (np.arange(10_000) + 0.5) / 10_000
    assert np.mean([acceptance.bound(sigma, 1.0) for sigma in sigmas]) == pytest.approx(np.pi / 2, abs=1e-4)
    losses = examiner().losses(SIGMAS)
    assert losses.nothing == pytest.approx(2.0, abs=0.1)


def test_predicting_only_the_spread_costs_the_bound() -> None:
    """On latents without any structure the best linear predictor is no better than its bound says."""
    for sigma in SIGMAS:
        latents, noise = (mx.random.normal((1, 4096, 128), key=mx.random.key(n)) for n in (1, 2))
        x = (1 - sigma) * latents + sigma * noise
        scale = (sigma - (1 - sigma)) / (sigma**2 + (1 - sigma) ** 2)
        batch = replace(next(iter(Pictures().batches(None))), latents=latents)
        assert acceptance.error(scale * x, batch, noise) == pytest.approx(acceptance.bound(sigma, 1.0), rel=0.01)


def test_a_perfect_model_passes() -> None:
    finding = judged(examiner())
    assert finding.level == "yes"
    assert "spread alone costs" in finding.sentence


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("sign", "the sign of the velocity is turned"),
        ("time", "time runs the other way"),
        ("thousands", "wants sigma x 1000"),
        ("thousandths", "wants sigma / 1000"),
        ("text", "text: the captions' contexts mislead it"),
        ("untrained", "never trained or are damaged"),
    ],
)
def test_a_mistake_of_the_model_is_named(mistake: str, named: str) -> None:
    finding = judged(examiner(mistake))
    assert finding.level == "no"
    assert named in finding.sentence


def scaled(batch: Batch) -> Batch:
    return replace(batch, latents=5 * batch.latents + 2)


def test_latents_of_another_scale_are_named() -> None:
    @dataclass(frozen=True)
    class Knows(Perfect):
        """Was trained on unit scale: other values confuse it altogether."""

        def best(self, x: mx.array, batch: Batch, s: float) -> mx.array:
            if float(mx.std(batch.latents)) > 2:
                return mx.zeros_like(x)
            return super().best(x, batch, s)

    of = Knows(None, Pictures(scaled), Texts(), 1.0)  # pyright: ignore[reportArgumentType]
    finding = acceptance.judge(of.losses(SIGMAS), of.diagnose)
    assert finding.level == "no"
    assert "not at unit scale" in finding.sentence


def test_an_untrained_model_on_latents_of_another_scale_is_not_explained_by_the_scale() -> None:
    finding = judged(examiner("untrained", scaled))
    assert finding.level == "no"
    assert "not at unit scale" not in finding.sentence


@pytest.mark.parametrize("first", [4, 32])
def test_channels_in_another_order_are_named(first: int) -> None:
    @dataclass(frozen=True)
    class Ordered(Perfect):
        """Knows the colours by heart, in the order of its own training."""

        def best(self, x: mx.array, batch: Batch, s: float) -> mx.array:
            number = told_of(batch)
            data = mx.random.normal((1, 1, 128), key=mx.random.key(abs(number)))
            return (x - (1 - s) * data) / max(s, 1e-3) - data

    def turn(batch: Batch) -> Batch:
        return replace(batch, latents=acceptance._turned(batch.latents, first))

    of = Ordered(None, Pictures(turn), Texts(), 1.0)  # pyright: ignore[reportArgumentType]
    finding = acceptance.judge(of.losses(SIGMAS), of.diagnose)
    assert finding.level == "no"
    assert "channels of the latents stand in another order" in finding.sentence


def test_output_that_is_not_finite_is_a_no() -> None:
    class Broken(Perfect):
        def best(self, x: mx.array, batch: Batch, s: float) -> mx.array:
            return mx.full(x.shape, float("nan"))

    of = Broken(None, Pictures(), Texts(), 1.0)  # pyright: ignore[reportArgumentType]
    finding = acceptance.judge(of.losses(SIGMAS), of.diagnose)
    assert (finding.level, "not finite" in finding.sentence) == ("no", True)


# Captions


def test_own_captions_must_help() -> None:
    assert examiner("uses text").look_at_captions().level == "yes"
    indifferent = examiner().look_at_captions()
    assert (indifferent.level, "next to no use" in indifferent.sentence) == ("unsure", True)


def test_captions_that_mislead_are_a_no() -> None:
    class Misled(Perfect):
        """Its own caption is worse than any other."""

        def best(self, x: mx.array, batch: Batch, s: float) -> mx.array:
            number = told_of(batch)
            own = mx.random.normal((1, 1, 128), key=mx.random.key(number))
            is_own = mx.allclose(own, batch.latents[:, :1])
            return super().best(x, batch, s) + mx.where(is_own, 1.0, 0.0)

    finding = Misled(None, Pictures(), Texts(), 1.0).look_at_captions()  # pyright: ignore[reportArgumentType]
    assert finding.level == "no"
    assert "another text encoder" in finding.sentence


def test_one_caption_for_all_tells_nothing() -> None:
    of = examiner()
    of.chosen.items = [replace(item, captions=("c1",)) for item in of.chosen.items]
    assert of.look_at_captions().level == "unsure"


# The store


def texts(*values: np.ndarray) -> list[Finding]:
    return list(acceptance._look_at_text(values, 4, 8))


def test_contexts_are_looked_at() -> None:
    one, other = (np.random.default_rng(n).standard_normal((4, 8)) for n in (0, 1))
    assert [f.level for f in texts(one, other)] == ["yes"]
    broken = one.copy()
    broken[2, 3] = np.inf
    for wrong, said in (
        ((one, one), "all equal"), ((one, broken), "not finite"), ((one, np.full((4, 8), 3.0)), "one number"),
        ((one[:3], other), "not the 4 rows x 8 channels"),
    ):  # fmt: skip
        (finding,) = texts(*wrong)
        assert finding.level == "no"
        assert said in finding.sentence
    assert texts(one)[0].level == "yes", "a single caption cannot be compared with others"


def latents(values: np.ndarray) -> Finding:
    (finding,) = acceptance._look_at_latents([values])
    return finding


def test_latents_are_looked_at_channel_by_channel() -> None:
    normal = np.random.default_rng(0).standard_normal((8, 8, 128))
    assert latents(normal).level == "yes"
    assert latents(4 * normal).level == latents(0.1 * normal).level == latents(normal + 1).level == "no"
    assert "batch-norm" in latents(4 * normal).sentence
    some = normal * np.where(np.arange(128) < 30, 4, 1)
    assert latents(some).level == "yes"
    assert "30 of them outside" in latents(some).sentence
    assert latents(normal * np.where(np.arange(128) % 3, 1.0, np.nan)).level == "no"


def test_the_worst_finding_is_the_verdict() -> None:
    yes, unsure, no = (Finding("a", level, "") for level in ("yes", "unsure", "no"))
    assert verdict([yes, yes]) == "yes"
    assert verdict([yes, unsure]) == "unsure"
    assert verdict([no, unsure, yes]) == "no"


# A real transformer, untrained


def test_an_untrained_transformer_is_a_no(dev: Path, encoded_store: Path) -> None:
    model = ours.load(dev)
    store = cache.open(encoded_store)
    body = store.sets()[0].body
    contexts = open_contexts(store, body, model.spec.context_width)
    chosen = Chosen(body, 8)
    assert sorted(item.id for item in chosen.items) == [f"{n}.png" for n in range(5)]
    passes: list[None] = []
    real = Examiner(model, chosen, contexts, 1.0, lambda: passes.append(None))
    losses = real.losses(SIGMAS)
    assert len(passes) == 5 * len(SIGMAS)
    assert losses.share > 1
    assert losses.base == real.losses(SIGMAS).base, "the noise is fixed"
    finding = judged(real)  # type: ignore[arg-type]
    assert finding.level == "no"
    assert verdict(acceptance.short(model, body, contexts, 1.0)) == "no"


# Training on trial


@pytest.mark.parametrize(
    ("losses", "level"),
    [
        ([2.0, 1.9, 1.8], "yes"),
        ([2.0, 2.03], "yes"),
        ([2.0, 1.8, 2.3], "unsure"),
        ([2.0, 2.08], "unsure"),
        ([2.0, 2.3, 2.4], "no"),
        ([2.0, None], "no"),
        ([], "unsure"),
    ],
)
def test_the_held_out_loss_must_not_rise(losses: list, level: str) -> None:
    assert trial.judge_held_out(losses).level == level


@pytest.mark.parametrize(
    ("losses", "level"),
    [([2.0] * 60, "yes"), ([2.0] * 50 + [9.0] * 10, "no"), ([2.0] * 30 + [None] + [2.0] * 29, "no"), ([None], "no")],
)
def test_the_losses_of_steps_must_be_finite_and_not_grow(losses: list, level: str) -> None:
    assert trial.judge_steps(losses).level == level


@pytest.mark.parametrize(
    ("largest", "level"),
    [({"a": 0.1, "b": 0.2}, "yes"), ({"a": 0.1, "b": 0.0}, "unsure"), ({"a": 0.0}, "no"), ({"a": float("nan")}, "no")],
)
def test_the_adapter_must_not_be_zero(largest: dict, level: str) -> None:
    assert trial.judge_adapter(largest).level == level


@pytest.mark.parametrize(
    ("after", "level", "said"),
    [(0.9, "yes", ""), (0.4, "unsure", "previews"), (0.1, "no", "collapsed"), (9.0, "no", "diverged")],
)
def test_pictures_must_keep_their_contrast(after: float, level: str, said: str) -> None:
    finding = trial.judge_spread(1.0, after)
    assert finding.level == level
    assert said in finding.sentence
