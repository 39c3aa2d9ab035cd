"""The schedule of sampling, and Euler steps through a transformer whose velocity is known."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.stages.train import previews, sample
from flux2_relay.stages.train.contexts import Contexts
from flux2_relay.stages.train.options import PreviewOptions
from flux2_relay.stages.train.sample import Picture
from flux2_relay.stages.train.transformer import Transformer

# tokens, steps: mu, its exponential, sigma after the first step, last sigma before 0 (diffusers' own numbers)
TABLE = [
    (4096, 50, 2.0234, 7.564, 0.99731, 0.13372),
    (4096, 28, 2.1514, 8.597, 0.99571, 0.24151),
    (4096, 4, 2.2912, 9.887, 0.96738, 0.76720),
    (1024, 50, 1.7020, 5.485, 0.99629, 0.10066),
    (1024, 4, 2.0307, 7.619, 0.95809, 0.71750),
]


@pytest.mark.parametrize(("rows", "steps", "mu", "shift", "second", "last"), TABLE)
def test_schedule_is_that_of_the_reference(rows, steps, mu, shift, second, last) -> None:
    assert sample.empirical_mu(steps, rows) == pytest.approx(mu, abs=6e-5)
    assert math.exp(sample.empirical_mu(steps, rows)) == pytest.approx(shift, abs=6e-4)
    sigmas = sample.schedule(steps, rows)
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert sigmas[1] == pytest.approx(second, abs=6e-6)
    assert sigmas[-2] == pytest.approx(last, abs=6e-6)
    assert sigmas == sorted(sigmas, reverse=True)


def test_mu_jumps_where_the_reference_jumps() -> None:
    assert sample.empirical_mu(50, 4300) == pytest.approx(2.0447, abs=6e-5)
    assert sample.empirical_mu(50, 4301) == pytest.approx(1.1847, abs=6e-5)


def test_one_step_goes_from_noise_to_the_end() -> None:
    assert sample.schedule(1, 16) == [1, 0]


@dataclass
class Straight:
    """Stands for a transformer: the velocity is `context[0, 0]` everywhere; remembers what it was asked."""

    guidance: bool
    asked: list = field(default_factory=list)
    pieces: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(settle=lambda: None))
    run: object = None

    @property
    def spec(self):
        return SimpleNamespace(guidance=self.guidance, channels=4)

    def __call__(self, latents, context, sigma, guidance, latent_ids, text_ids):
        self.asked.append((sigma.item(), None if guidance is None else guidance.item(), context[0, 0, 0].item()))
        assert latent_ids.shape == (latents.shape[1], 4)
        assert text_ids.shape == (context.shape[1], 4)
        return mx.full(latents.shape, context[0, 0, 0])


def draw(model: Straight, **changes) -> np.ndarray:
    picture = {
        "context": mx.full((3, 2), 5.0),
        "negative": mx.full((3, 2), 2.0),
        "height": 2,
        "width": 3,
        "seed": 7,
        "steps": 4,
        "guidance": 3.0,
    }
    return np.array(sample.draw(cast(Transformer, model), Picture(**{**picture, **changes})))


def test_guidance_is_an_input_of_a_distilled_model() -> None:
    model = Straight(guidance=True)
    draw(model)
    assert [asked[1:] for asked in model.asked] == [(3.0, 5.0)] * 4
    assert [asked[0] for asked in model.asked] == pytest.approx(sample.schedule(4, 6)[:-1])


def test_guidance_is_classifier_free_where_a_negative_is_given() -> None:
    model = Straight(guidance=False)
    # Steps add up to -1 times the velocity 2 + 3 (5 - 2) = 11.
    start = draw(Straight(guidance=False), context=mx.zeros((3, 2)), negative=None)
    np.testing.assert_allclose(draw(model) - start, -11, rtol=1e-5)
    assert [asked[1:] for asked in model.asked] == [(None, 5.0), (None, 2.0)] * 4


@pytest.mark.parametrize("changes", [{"guidance": 1.0}, {"guidance": 0.0}, {"negative": None}])
def test_without_need_the_negative_is_not_computed(changes) -> None:
    model = Straight(guidance=False)
    draw(model, **changes)
    assert [asked[2] for asked in model.asked] == [5.0] * 4


def test_a_seed_is_a_noise() -> None:
    nothing = {"context": mx.zeros((3, 2)), "negative": None}
    first, same, other = (draw(Straight(guidance=False), seed=seed, **nothing) for seed in (7, 7, 8))
    assert first.shape == (2, 3, 4)
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_distilled_model_is_given_no_negative(distilled: bool, tmp_path: Path) -> None:
    class Shelf:
        def context(self, key: str) -> mx.array:
            return mx.array([float(len(key))])

    options = PreviewOptions(prompts=("a dog",))
    keys = {"text": "four", "negative": "seventy", "references": []}
    drawn = previews.Previews(options, [keys], cast(Contexts, Shelf()), distilled, tmp_path)
    picture = drawn._picture(options.pictures()[0], keys)
    assert picture.context.item() == 4
    assert (None if picture.negative is None else picture.negative.item()) == (None if distilled else 7)
