"""Noise levels, weights and the loss against numbers that follow from their definitions."""

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.stages.train import objective
from flux2_relay.stages.train.options import TrainOptions

GRID = (np.arange(20_000) + 0.5) / 20_000

# sigma, shift, tokens: mean, 5 %, median and 95 %; of draws by numpy, not by this code
TABLE = [
    ("uniform", 3.0, 1024, 0.500, (0.05, 0.50, 0.95)),
    ("logit_normal", 3.0, 1024, 0.500, (0.16, 0.50, 0.84)),
    ("shift", 3.0, 1024, 0.714, (0.37, 0.75, 0.94)),
    ("shift", 1.0, 1024, 0.500, (0.16, 0.50, 0.84)),
    ("flux2_shift", 3.0, 1024, 0.627, (0.27, 0.65, 0.91)),
    ("flux2_shift", 3.0, 4096, 0.723, (0.38, 0.76, 0.94)),
    ("content", 3.0, 1024, 0.750, (0.14, 0.88, 1.00)),
    ("style", 3.0, 1024, 0.250, (0.00, 0.12, 0.86)),
]


@pytest.mark.parametrize(("name", "shift", "rows", "mean", "quantiles"), TABLE)
def test_distributions_of_sigma(name, shift, rows, mean, quantiles) -> None:
    options = TrainOptions(sigma=name, sigma_shift=shift)
    sigmas = np.array([objective.sigma_at(u, rows, options) for u in GRID])
    assert ((sigmas > 0) & (sigmas < 1)).all()
    assert abs(sigmas.mean() - mean) < 1e-2
    np.testing.assert_allclose(np.quantile(sigmas, [0.05, 0.5, 0.95]), quantiles, atol=6e-3)


def test_flux2_shift_is_linear_in_the_tokens() -> None:
    assert [objective.flux2_mu(rows) for rows in (256, 2176, 4096)] == pytest.approx([0.5, 0.825, 1.15])
    assert objective.shift(0.5, 3) == 0.75
    assert [objective.shift(s, 7) for s in (0, 1)] == [0, 1]


def test_an_unknown_distribution_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="cauchy"):
        objective.sigma_at(0.5, 1, TrainOptions(sigma="cauchy"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("weighting", ["none", "bell", "weighted"])
def test_weights_have_mean_one(weighting) -> None:
    weights = objective.loss_weight(GRID, TrainOptions(weighting=weighting))
    assert weights.dtype == np.float32
    assert abs(weights.mean() - 1) < 1e-4
    assert (weights >= -1e-6).all()


def test_bell_is_highest_in_the_middle_and_zero_at_the_ends() -> None:
    weights = objective.loss_weight(np.array([0, 0.5, 1]), TrainOptions(weighting="bell"))
    np.testing.assert_allclose(weights, [0, 1.580, 0], atol=1e-3)


def test_weighted_follows_its_table() -> None:
    weights = objective.loss_weight(np.array([0, 0.2, 0.55, 0.87, 1.0]), TrainOptions(weighting="weighted"))
    np.testing.assert_allclose(weights / weights[2], [0.45, 0.72, 1, 1.52, 0.91], rtol=1e-6)


def test_add_noise_goes_straight_from_latents_to_noise() -> None:
    latents, noise = (mx.random.normal((3, 5, 7), key=mx.random.key(n)) for n in (0, 1))
    mixed = np.array(objective.add_noise(latents, noise, mx.array([0.0, 1.0, 0.25])))
    np.testing.assert_array_equal(mixed[0], np.array(latents)[0])
    np.testing.assert_array_equal(mixed[1], np.array(noise)[1])
    np.testing.assert_allclose(mixed[2], 0.75 * np.array(latents)[2] + 0.25 * np.array(noise)[2], rtol=1e-5, atol=1e-6)
    assert objective.add_noise(latents.astype(mx.bfloat16), noise, mx.array([0.5] * 3)).dtype == mx.float32


def test_loss_is_the_weighted_mean_square_of_the_missed_velocity() -> None:
    latents, noise, prediction = (np.random.default_rng(n).standard_normal((2, 3, 4)) for n in range(3))
    weight = np.array([0.5, 2.0])
    expected = (weight * ((prediction - (noise - latents)) ** 2).mean((1, 2))).mean()
    given = objective.loss(*(mx.array(x.astype(np.float32)) for x in (prediction, latents, noise, weight)))
    assert float(given) == pytest.approx(expected, rel=1e-5)
    right = mx.array((noise - latents).astype(np.float32))
    assert float(objective.loss(right, *(mx.array(x.astype(np.float32)) for x in (latents, noise, weight)))) < 1e-12


def test_draw_is_a_function_of_seed_step_and_item() -> None:
    options = TrainOptions()
    sigma, noise = objective.draw(3, 5, 1, (16, 4), options)
    assert sigma == 0.24575597437118707
    np.testing.assert_allclose(
        np.array(noise[0]), [0.5520582795143127, -1.269522786140442, 0.8951433300971985, -0.8190368413925171], rtol=1e-6
    )
    mx.random.seed(99)
    again, same = objective.draw(3, 5, 1, (16, 4), options)
    assert again == sigma
    assert mx.array_equal(same, noise)
    others = [objective.draw(*at, (16, 4), options) for at in ((4, 5, 1), (3, 6, 1), (3, 5, 2))]
    assert len({s for s, _ in others} | {sigma}) == 4
    assert not any(mx.array_equal(n, noise) for _, n in others)


def test_noise_is_standard_normal() -> None:
    _, noise = objective.draw(0, 0, 0, (1024, 128), TrainOptions())
    values = np.array(noise)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
