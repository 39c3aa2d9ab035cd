"""Gradients block by block against `mx.grad` of the whole model."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, ours
from tiny import model as tiny
from tiny.compare import assert_all_near, assert_near

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import quantize, spec
from flux2_relay.stages.train import blocks, embeddings, lora, objective, pieces
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.residence import Streamed
from flux2_relay.stages.train.transformer import Transformer, from_tensors, load_transformer, tensor_shapes
from flux2_relay.stages.weights import open_tensors

CROSSED = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k")  # same shapes, other linears
TARGETS = {
    "blocks": "blocks",
    "attention": "attention",
    "single blocks alone": ("single*",),
    "double blocks alone": ("transformer_blocks.*",),
    "first block alone": ("transformer_blocks.0.ff.linear_in",),
    "last block alone": ("single_transformer_blocks.1.attn.to_out",),
    "another linear in each block": (*CROSSED, "single_transformer_blocks.0.attn.to_out"),
}


def load(folder: Path, bits: int = 32, dtype: mx.Dtype | None = None) -> Transformer:
    return load_transformer(folder, spec.read_transformer_spec(folder / "transformer"), bits, dtype)


@pytest.fixture(scope="module")
def of() -> Callable[[Path], Transformer]:
    """The models of this module, loaded once."""
    models: dict[Path, Transformer] = {}
    return lambda folder: models.setdefault(folder, load(folder))


def attach(model: Transformer, options: LoraOptions) -> None:
    """Adapters of which no factor is zero: with B = 0, nothing would reach A."""
    model.adapters = {}
    lora.attach(model, options, seed=0)
    shapes = {name: value.shape for name, value in lora.parameters(model).items()}
    lora.load(model, {name: mx.array(value) for name, value in cases.adapter(shapes, seed=1).items()})


def case_for(model: Transformer, **changes) -> cases.Case:
    guidance = (1.0, 3.5) if model.spec.guidance else None
    given = {"seed": 2, "text": 9, "grids": ((2, 3),), "guidance": guidance}
    return cases.draw(model.spec.context_width, **{**given, **changes})


def whole(model: Transformer, case: cases.Case, options: TrainOptions | None = None) -> tuple[float, ours.Arrays]:
    """Loss and gradients through the whole model at once."""
    weight = mx.array(objective.loss_weight(case.sigma, options or TrainOptions()))
    batch = ours.batch(case)
    sigma, noise, guidance = ours.tensors(case, "sigma", "noise", "guidance")

    def loss(values: dict[str, mx.array]) -> mx.array:
        lora.load(model, values)
        noisy = objective.add_noise(batch["latents"], noise, sigma)
        velocity = model(noisy, batch["context"], sigma, guidance, batch["latent_ids"], batch["text_ids"])
        return objective.loss(velocity, batch["latents"], noise, weight)

    values = lora.parameters(model)
    found, gradients = mx.value_and_grad(loss)(values)
    lora.load(model, values)
    return float(found), ours.numpy(gradients)


@pytest.mark.parametrize("targets", TARGETS)
def test_gradients_equal_those_of_the_whole_model(checkpoint: Path, of: Callable, targets: str) -> None:
    model = of(checkpoint)
    attach(model, LoraOptions(rank=2, alpha=3.0, targets=TARGETS[targets]))  # pyright: ignore[reportArgumentType]
    case = case_for(model)
    expected_loss, expected = whole(model, case)
    loss, gradients = ours.gradients(model, case)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert all(np.abs(value).max() > 0 for value in expected.values())
    assert_all_near(gradients, expected, 1e-5)


@pytest.mark.parametrize("weighting", ["bell", "weighted"])
def test_the_loss_is_weighted(dev: Path, of: Callable, weighting) -> None:
    model, options = of(dev), TrainOptions(weighting=weighting)
    attach(model, LoraOptions(rank=2, targets="attention"))
    case = case_for(model)
    expected_loss, expected = whole(model, case, options)
    loss, gradients = loss_and_gradients(
        model, ours.batch(case), *ours.tensors(case, "sigma", "noise", "guidance"), options=options
    )
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    assert_all_near(ours.numpy(gradients), expected, 1e-5)
    assert abs(float(loss) - ours.gradients(model, case)[0]) > 1e-3


def test_a_batch_is_the_mean_of_its_items(dev: Path, of: Callable) -> None:
    model = of(dev)
    attach(model, LoraOptions(rank=2))
    case = case_for(model)
    loss, gradients = ours.gradients(model, case)
    rows = ("latents", "context", "sigma", "guidance", "noise")
    items = []
    for index in range(2):
        part = {name: getattr(case, name)[index : index + 1] for name in rows}
        items.append(ours.gradients(model, cases.Case(latent_ids=case.latent_ids, text_ids=case.text_ids, **part)))
    assert loss == pytest.approx((items[0][0] + items[1][0]) / 2, rel=1e-6)
    mean = {name: (items[0][1][name] + items[1][1][name]) / 2 for name in gradients}
    assert_all_near(gradients, mean, 1e-5)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_gradients_through_packed_weights_are_those_of_the_weights_they_stand_for(
    checkpoint: Path, of: Callable, bits: int
) -> None:
    packed = load(checkpoint, bits, mx.float32)
    exact = load(checkpoint)
    for part, dense_part in zip(weights(packed), weights(exact), strict=True):
        for name, weight in part.items():
            columns = dense_part[name].shape[-1]
            dense_part[name] = quantize.dense(weight, columns, mx.float32)
    assert any(isinstance(weight, tuple) for weight in packed.residence.weights(0).values()) == (bits < 16)
    for model in (packed, exact):
        attach(model, LoraOptions(rank=2))
    case = case_for(exact)
    loss, gradients = ours.gradients(packed, case)
    expected_loss, expected = ours.gradients(exact, case)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_all_near(gradients, expected, 1e-5)
    original = of(checkpoint)
    attach(original, LoraOptions(rank=2))
    error = abs(loss / ours.gradients(original, case)[0] - 1)
    assert 0 < error < {16: 0.01, 8: 0.01, 4: 0.2}[bits]


def weights(model: Transformer) -> list:
    return [model.outer, *(model.residence.weights(place) for place in range(model.spec.blocks))]


def test_bfloat16_gradients_are_near_and_float32(dev: Path, of: Callable) -> None:
    exact, rough = of(dev), load(dev, 16)
    for model in (exact, rough):
        attach(model, LoraOptions(rank=2, targets="attention"))
    case = case_for(exact)
    expected_loss, expected = ours.gradients(exact, case)
    loss, gradients = loss_and_gradients(rough, ours.batch(case), *ours.tensors(case, "sigma", "noise", "guidance"))
    assert loss.dtype == mx.float32
    assert {value.dtype for value in gradients.values()} == {mx.float32}
    assert float(loss) == pytest.approx(expected_loss, rel=0.03)
    for name, value in ours.numpy(gradients).items():
        assert np.linalg.norm(value - expected[name]) < 0.15 * np.linalg.norm(expected[name]), name


def test_streamed_blocks_give_the_same_bits(dev: Path) -> None:
    """Whatever is resident: forward and backward, two passes in a row, in one block's order of reading."""
    model_spec = spec.read_transformer_spec(dev / "transformer")
    expected = None
    for resident, ahead in ((model_spec.blocks, 1), (0, 1), (1, 2), (model_spec.blocks - 1, 1)):
        tensors, streamed = open_tensors(dev / "transformer"), partial(Streamed, resident=resident, ahead=ahead)
        model = from_tensors(tensors, model_spec, 32, residence=streamed)
        attach(model, LoraOptions(rank=2))
        case = case_for(model)
        for _ in range(2):
            loss, gradients = ours.gradients(model, case)
            expected = expected or (loss, gradients)
            assert loss == expected[0]
            assert all((value == expected[1][name]).all() for name, value in gradients.items())


def test_at_most_a_few_pieces_are_under_way(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, started, waited = load(dev), [], []
    attach(model, LoraOptions(rank=2))
    model.pieces.ahead = 1
    monkeypatch.setattr(pieces.mx, "async_eval", started.append)
    monkeypatch.setattr(pieces.mx, "eval", lambda *arrays: waited.append(arrays))
    ours.gradients(model, case_for(model))
    assert len(started) > 40
    assert len(waited) >= len(started) - 1
    assert not model.pieces.under_way


def test_compiled_equals_uncompiled(tmp_path: Path) -> None:
    """Smallest sizes, since compiling costs seconds; blocks of a kind carry adapters of one shape on other linears."""
    model = smallest(tmp_path)
    attach(model, LoraOptions(rank=2, targets=(*CROSSED, "single*")))
    case = case_for(model)
    plain_loss, plain = ours.gradients(model, case)
    mx.enable_compile()
    model.pieces.compiles = True
    loss, gradients = ours.gradients(model, case)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert_all_near(gradients, plain, 1e-5)


def smallest(folder: Path) -> Transformer:
    small = spec.TransformerSpec(
        double_blocks=2,
        single_blocks=1,
        heads=2,
        head_dim=8,
        context_width=12,
        guidance=True,
        rope_axes=(2, 2, 2, 2),
    )
    (folder / "transformer").mkdir()
    tiny.save(folder / "transformer/m.safetensors", tiny.random(tensor_shapes(small), 0))
    return load_transformer(folder, small, bits=32)


# The forward pass


def test_adapters_with_zero_b_change_nothing(checkpoint: Path, of: Callable) -> None:
    model = of(checkpoint)
    model.adapters = {}
    case = case_for(model)
    before = ours.velocity(model, case)
    lora.attach(model, LoraOptions(rank=2), seed=0)
    np.testing.assert_array_equal(ours.velocity(model, case), before)
    attach(model, LoraOptions(rank=2))
    assert np.abs(ours.velocity(model, case) - before).max() > 1e-3


def test_guidance_is_ignored_by_models_that_take_none(klein: Path, of: Callable) -> None:
    model = of(klein)
    model.adapters = {}
    with_guidance, without = case_for(model, guidance=(1.0, 3.5)), case_for(model)
    np.testing.assert_array_equal(ours.velocity(model, with_guidance), ours.velocity(model, without))


def test_guidance_matters_to_models_that_take_it(dev: Path, of: Callable) -> None:
    model = of(dev)
    model.adapters = {}
    low, high = (ours.velocity(model, case_for(model, guidance=(g, g))) for g in (1.0, 3.5))
    assert np.abs(low - high).max() > 1e-3


def test_references_change_the_velocity_of_the_target(dev: Path, of: Callable) -> None:
    model = of(dev)
    model.adapters = {}
    both = case_for(model, grids=((2, 3), (2, 2)))
    changed = both.latents.copy()
    changed[:, 6:] += 1
    moved = cases.Case(
        **{**{name: getattr(both, name) for name in cases.Case.__dataclass_fields__}, "latents": changed}
    )
    assert np.abs(ours.velocity(model, both)[:, :6] - ours.velocity(model, moved)[:, :6]).max() > 1e-3


def test_rotary_turns_by_the_distance_alone() -> None:
    """q and k of two rows give the same product however far both are moved along an axis."""
    sizes = spec.DEV
    x = mx.random.normal((1, 2, 2, 1, 128), key=mx.random.key(0))
    products = []
    for start in (0, 7):
        for axis in range(4):
            ids = np.zeros((2, 4), np.int64)
            ids[:, axis] = start, start + 3
            cos, sin, _ = blocks.turning((mx.ones(128), mx.ones(128)), embeddings.rotary_tables(ids, sizes))
            turned = np.array(blocks.turn(x, cos, sin))[0, :, 0, 0]
            products.append(float(turned[0] @ turned[1]))
    assert_near(np.array(products[4:]), np.array(products[:4]), 1e-5)
    assert len({round(p, 3) for p in products[:4]}) == 4  # and each axis turns its own pairs


def test_the_checkpoint_must_fit_its_config(dev: Path, tmp_path: Path) -> None:
    config = json.loads((dev / "transformer/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(InputError, match=r"transformer_blocks\.2\.attn\.to_q\.weight is missing"):
        load_transformer(dev, spec.read_transformer_spec(tmp_path), bits=32)
