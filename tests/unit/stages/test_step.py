"""The gradients of a step: however its items are cut into passes, they are the same."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, ours
from tiny.compare import assert_all_near

from flux2_relay.stages.train import lora
from flux2_relay.stages.train.batches import Draw, Item, Loaded
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.step import Terms, gradients_of
from flux2_relay.stages.train.transformer import Transformer

ITEMS = 4


@pytest.fixture(scope="module")
def model(dev: Path) -> Transformer:
    loaded = ours.load(dev)
    lora.attach(loaded, LoraOptions(rank=2, targets="attention"), seed=0)
    shapes = {name: value.shape for name, value in lora.parameters(loaded).items()}
    lora.load(loaded, {name: mx.array(value) for name, value in cases.adapter(shapes, seed=1).items()})
    return loaded


def loaded(model: Transformer, passes: int, step: int = 3) -> Loaded:
    """Four items of one step, in so many passes."""
    case = cases.draw(model.spec.context_width, seed=2, text=5, grids=((2, 3),), sigma=(0.5,) * ITEMS)
    whole, size = ours.batch(case), ITEMS // passes
    shared = {"latent_ids": whole["latent_ids"], "text_ids": whole["text_ids"]}
    parts = []
    for start in range(0, ITEMS, size):
        rows = slice(start, start + size)
        draws = [Draw(place, Item(f"{place}", "key", (2, 3), ("key",)), "key") for place in range(start, start + size)]
        parts.append((draws, Batch(latents=whole["latents"][rows], context=whole["context"][rows], **shared)))
    return Loaded(step, parts, 0.0)


@pytest.mark.parametrize("passes", [2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_passes_equal_one_batch(model: Transformer, passes: int, dropout: float) -> None:
    terms = Terms(7, TrainOptions(weighting="bell"), dropout)
    expected_loss, expected, expected_sigmas = gradients_of(model, loaded(model, 1), terms)
    loss, found, sigmas = gradients_of(model, loaded(model, passes), terms)
    assert sigmas == expected_sigmas
    assert len(set(sigmas)) == ITEMS
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_all_near(ours.numpy(found), ours.numpy(expected), 1e-5)


@pytest.mark.parametrize(("seed", "step", "dropout"), [(8, 3, 0.0), (7, 4, 0.0), (7, 3, 0.3)])
def test_they_depend_on_seed_step_and_dropout(model: Transformer, seed: int, step: int, dropout: float) -> None:
    _, expected, _ = gradients_of(model, loaded(model, 1), Terms(7, TrainOptions(), 0.0))
    _, found, _ = gradients_of(model, loaded(model, 1, step), Terms(seed, TrainOptions(), dropout))
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    assert np.abs(np.array(found[name] - expected[name])).max() > 1e-4 * np.abs(np.array(expected[name])).max()
