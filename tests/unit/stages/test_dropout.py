"""Dropout of adapter inputs: the same masks in both directions, of the right share, and off where it should be."""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, ours
from tiny.compare import assert_all_near

from flux2_relay.stages.train import blocks, dropout, lora, objective
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.kinds import Lora
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.transformer import Transformer


@pytest.fixture(params=["dev", "klein"])
def model(request: pytest.FixtureRequest) -> Transformer:
    loaded = ours.load(request.getfixturevalue(request.param))
    lora.attach(loaded, LoraOptions(rank=3, alpha=4.0), seed=0)
    shapes = {name: value.shape for name, value in lora.parameters(loaded).items()}
    lora.load(loaded, {name: mx.array(value) for name, value in cases.adapter(shapes, seed=1).items()})
    return loaded


def case_for(model: Transformer) -> cases.Case:
    guidance = (1.0, 3.5) if model.spec.guidance else None
    return cases.draw(model.spec.context_width, seed=2, text=9, grids=((2, 3),), guidance=guidance)


def by_hand(model: Transformer, case: cases.Case, masks: Callable[[mx.array, tuple[int, ...]], mx.array]) -> tuple:
    """Loss and gradients by plain autodiff, every adapter's input multiplied by `masks(its keys, shape)`."""
    batch, (sigma, noise, guidance) = ours.batch(case), ours.tensors(case, "sigma", "noise", "guidance")

    def linear(x: mx.array, layer: blocks.Linear) -> mx.array:
        weight, adapter = layer
        assert isinstance(weight, mx.array)
        if not adapter:
            return x @ weight.T
        assert isinstance(adapter, Lora)
        a, b, scale, (keys, _) = adapter
        return x @ weight.T + scale * ((x * masks(keys, x.shape)) @ a.T @ b.T)

    def loss(values: dict[str, mx.array]) -> mx.array:
        lora.load(plain, values)
        dropping = lora.with_dropout(plain, 0.4, 7, 3, [0, 1])
        noisy = objective.add_noise(batch["latents"], noise, sigma)
        velocity = dropping(noisy, batch["context"], sigma, guidance, batch["latent_ids"], batch["text_ids"])
        return objective.loss(velocity, batch["latents"], noise, mx.ones(2))

    plain = lora.with_dropout(model, 0, 0, 0, [])
    values = lora.parameters(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "linear", linear)
        found = mx.value_and_grad(loss)(values)
        mx.eval(found)
    lora.load(model, values)
    return float(found[0]), ours.numpy(found[1])


def masks_of_keys(keys: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The masks anew, item by item: kept elements are divided by the share that is kept."""
    return mx.stack([mx.random.bernoulli(mx.array(0.6), shape[1:], key=k) / 0.6 for k in keys])


def test_gradients_equal_plain_autodiff_with_the_same_masks(model: Transformer) -> None:
    case = case_for(model)
    expected_loss, expected = by_hand(model, case, masks_of_keys)
    dropping = lora.with_dropout(model, 0.4, 7, 3, [0, 1])
    loss, gradients = loss_and_gradients(dropping, ours.batch(case), *ours.tensors(case, "sigma", "noise", "guidance"))
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    assert all(np.abs(value).max() > 0 for value in expected.values())
    assert_all_near(ours.numpy(gradients), expected, 1e-5)
    assert abs(float(loss) / ours.gradients(model, case)[0] - 1) > 1e-4  # it does drop, and not from the model itself


def masks(share: float, seed: int = 1, step: int = 2, places: Sequence[int] = (0, 1), module: str = "m") -> np.ndarray:
    ones = mx.ones((len(places), 200, 100))
    return np.array(dropout.dropped([ones], (dropout.keys(seed, step, places, module), mx.array(1 - share)))[0])


def test_the_share_is_dropped_and_the_mean_stays() -> None:
    found = masks(0.25)
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    assert abs((found == 0).mean() - 0.25) < 0.01
    assert abs(found.mean() - 1) < 0.01


def test_a_mask_depends_on_seed_step_item_and_module_alone() -> None:
    first = masks(0.5)
    np.testing.assert_array_equal(masks(0.5), first)
    np.testing.assert_array_equal(masks(0.5, places=(1,))[0], first[1])  # whatever pass an item falls in
    others = [masks(0.5, seed=2), masks(0.5, step=3), masks(0.5, module="n"), masks(0.5, places=(2, 3))]
    assert all(abs((other == first).mean() - 0.5) < 0.02 for other in others)
    assert abs((first[0] == first[1]).mean() - 0.5) < 0.02


def test_pieces_are_cut_from_the_mask_of_the_whole() -> None:
    x, dropping = mx.random.normal((2, 5, 12)), (dropout.keys(1, 2, (0, 1), "m"), mx.array(0.5))
    (whole,) = dropout.dropped([x], dropping)
    pieces = dropout.dropped(list(mx.split(x, [3, 7], axis=-1)), dropping)
    assert mx.array_equal(mx.concatenate(pieces, axis=-1), whole)


def test_no_share_changes_nothing(dev: Path) -> None:
    model = ours.load(dev)
    assert lora.with_dropout(model, 0.0, 1, 2, [0]) is model
