"""Pictures: the schedule and the whole denoising loop, against diffusers' pipelines."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from oracle.reference import STEPS, Reference
from tiny import adapters, ours
from tiny.compare import assert_near, relative_error

from flux2_relay.stages.train import mixing, randomness, sample
from flux2_relay.stages.train.transformer import DOUBLE, Transformer

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


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # several are what is meant
def test_picture_with_adapters(reference: Reference, tmp_path: Path) -> None:
    """Two files at once, of other ranks and modules, each at a scale of its own: diffusers' `set_adapters`."""
    model, scales = ours.load(reference.folder), (0.8, -0.5)
    some = (lambda path: path.startswith(DOUBLE), lambda path: path.endswith(("to_q", "attn.to_out", "x_embedder")))
    files = [
        adapters.write(tmp_path / f"{n}.safetensors", adapters.factors(model.spec, 4 - n, n, wanted))
        for n, wanted in enumerate(some)
    ]
    model.adapters = mixing.mix(mixing.read_all(files, model.spec), scales)
    of_class = Flux2KleinPipeline if reference.is_klein else Flux2Pipeline
    fresh = Flux2Transformer2DModel.from_pretrained(reference.folder / "transformer", torch_dtype=torch.float32)
    pipeline = of_class(None, None, None, None, fresh.eval())
    for file in files:
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name=f"n{file.stem}")
    pipeline.set_adapters(["n0", "n1"], list(scales))
    changed = Reference(reference.folder)
    changed.transformer = pipeline.transformer
    expected, actual = both(changed, 3.5, model)
    assert_near(actual, expected, 1e-4)
    base, _ = both(reference, 3.5, model)
    assert relative_error(base, expected) > 1e-2, "the adapters do too little to show a mistake"


def both(reference: Reference, guidance: float, model: Transformer | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The latents of one picture, diffusers' and ours, from the noise that ours starts with."""
    model = model or ours.load(reference.folder)
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
