"""Pictures: the schedule and the whole denoising loop, against diffusers' pipelines."""

import mlx.core as mx
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from oracle.reference import STEPS, Reference
from tiny import ours
from tiny.compare import assert_near, relative_error

from flux2_relay.stages.train import randomness, sample

GRID, ROWS, SEED = (4, 5), 24, 9


@pytest.mark.parametrize("rows", [64, 1024, 4096, 4300, 4301, 9216])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_schedule(steps: int, rows: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(rows, steps))
    np.testing.assert_allclose(sample.schedule(steps, rows), scheduler.sigmas.numpy(), rtol=2e-6, atol=0)


def test_picture(reference: Reference) -> None:
    """Dev takes guidance as an input; Klein as here is distilled, and then the negative prompt has no say."""
    expected, actual = both(reference, guidance=3.5)
    assert_near(actual, expected, 1e-4)
    other, _ = both(reference, guidance=1.0)
    assert (relative_error(other, expected) > 1e-2) != reference.is_distilled


def test_picture_with_a_negative_prompt(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    if not reference.is_klein:
        pytest.skip("dev reads no negative prompt")
    monkeypatch.setattr(reference, "is_distilled", False)
    expected, actual = both(reference, guidance=3.5)
    assert_near(actual, expected, 1e-4)


def both(reference: Reference, guidance: float) -> tuple[np.ndarray, np.ndarray]:
    """The latents of one picture, diffusers' and ours, from the noise that ours starts with."""
    model = ours.load(reference.folder)
    random = np.random.default_rng(8)
    context, negative = random.standard_normal((2, ROWS, model.spec.context_width), dtype=np.float32)
    noise = np.array(mx.random.normal((1, GRID[0] * GRID[1], 128), key=randomness.key(SEED, "preview")))
    expected = reference.sample(context, negative, noise, GRID, guidance)
    picture = sample.Picture(
        context=mx.array(context),
        # What a distilled model is given: stage two asks the spec.
        negative=None if reference.is_distilled else mx.array(negative),
        height=GRID[0],
        width=GRID[1],
        seed=SEED,
        steps=STEPS,
        guidance=guidance,
    )
    return expected, np.array(sample.draw(model, picture))
