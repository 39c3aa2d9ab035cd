"""The kinds of adapter: each block by block as through the whole model, each the base model at first."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, ours
from tiny.compare import assert_all_near, assert_near

from flux2_relay.stages import spec
from flux2_relay.stages.train import lokr, lora, objective
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.dora import Dora
from flux2_relay.stages.train.kinds import Lora, Sum
from flux2_relay.stages.train.lokr import Lokr
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.transformer import Transformer, block_linears, load_transformer

SIX = ("to_q", "to_v", "to_add_out", "ff.linear_in", "ff_context.linear_out", "single*")
KINDS = {
    "dora": LoraOptions(kind="dora", rank=2, alpha=3.0, targets=SIX),
    "lokr": LoraOptions(kind="lokr", rank=2, alpha=3.0, factor=4, targets=SIX),
    "lokr whole": LoraOptions(kind="lokr", rank=400, factor="auto", targets=SIX),
}


def load(folder: Path, bits: int = 32) -> Transformer:
    return load_transformer(folder, spec.read_transformer_spec(folder / "transformer"), bits, mx.float32)


@pytest.fixture(scope="module")
def of() -> Callable[[Path], Transformer]:
    """The models of this module, loaded once."""
    models: dict[Path, Transformer] = {}
    return lambda folder: models.setdefault(folder, load(folder))


def attach(model: Transformer, options: LoraOptions) -> None:
    """Adapters of which no factor is zero; magnitudes within a tenth of the lengths that they began as."""
    lora.attach(model, options, seed=0)
    start = lora.parameters(model)
    drawn = cases.adapter({name: value.shape for name, value in start.items()}, seed=1)
    values = {name: mx.array(value) for name, value in drawn.items()}
    for name, value in start.items():
        if "magnitude" in name:
            values[name] = value * (1 + 0.1 * mx.sin(100 * values[name]))
        if "lokr_w1" in name:
            values[name] = 0.3 * values[name]
    lora.load(model, values)


def case_for(model: Transformer) -> cases.Case:
    guidance = (1.0, 3.5) if model.spec.guidance else None
    return cases.draw(model.spec.context_width, seed=2, text=9, grids=((2, 3),), guidance=guidance)


def whole(model: Transformer, case: cases.Case, share: float = 0.0) -> tuple[float, ours.Arrays]:
    """Loss and gradients by plain autodiff through the whole model at once."""
    batch, (sigma, noise, guidance) = ours.batch(case), ours.tensors(case, "sigma", "noise", "guidance")

    def loss(values: dict[str, mx.array]) -> mx.array:
        lora.load(model, values)
        dropping = lora.with_dropout(model, share, 7, 3, [0, 1])
        noisy = objective.add_noise(batch["latents"], noise, sigma)
        velocity = dropping(noisy, batch["context"], sigma, guidance, batch["latent_ids"], batch["text_ids"])
        return objective.loss(velocity, batch["latents"], noise, mx.ones(2))

    values = lora.parameters(model)
    found, gradients = mx.value_and_grad(loss)(values)
    lora.load(model, values)
    return float(found), ours.numpy(gradients)


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_whole_model(dev: Path, of: Callable, kind: str, share: float) -> None:
    model = of(dev)
    attach(model, KINDS[kind])
    case = case_for(model)
    expected_loss, expected = whole(model, case, share)
    dropping = lora.with_dropout(model, share, 7, 3, [0, 1])
    loss, gradients = loss_and_gradients(dropping, ours.batch(case), *ours.tensors(case, "sigma", "noise", "guidance"))
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    assert all(np.abs(value).max() > 0 for value in expected.values())
    assert_all_near(ours.numpy(gradients), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_base_to_the_bit(dev: Path, of: Callable, kind: str) -> None:
    model = of(dev)
    model.adapters = {}
    case = case_for(model)
    before = ours.velocity(model, case)
    lora.attach(model, KINDS[kind], seed=0)
    np.testing.assert_array_equal(ours.velocity(model, case), before)
    attach(model, KINDS[kind])
    assert np.abs(ours.velocity(model, case) - before).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_does_what_its_matrix_does(dev: Path, of: Callable, kind: str) -> None:
    """The formulas of the papers, with the matrices formed."""
    model = of(dev)
    attach(model, KINDS[kind])
    for path in ("transformer_blocks.0.ff.linear_in", "single_transformer_blocks.1.attn.to_out"):
        adapter = model.adapters[path]
        place = 0 if path.startswith("transformer") else model.spec.double_blocks + 1
        weight = model.residence.weights(place)[path.split(".", 2)[2]]
        assert isinstance(weight, mx.array)
        x = mx.random.normal((2, 5, weight.shape[1]))
        expected = np.array(x) @ matrix(adapter, np.array(weight)).T
        assert_near(np.array(adapter.apply(x, weight)), expected, 1e-5)
        base = x @ weight.T
        assert_near(np.array(base + adapter.delta(x, weight, base)), expected, 1e-5)
        both = Sum(
            (adapter, Lora(mx.ones((1, weight.shape[1])), mx.ones((weight.shape[0], 1)), mx.array(0.1))),
            (mx.array(0.5), mx.array(2.0)),
        )
        summed = 0.5 * (expected + np.array(base)) + 0.2 * np.array(x).sum(-1, keepdims=True)
        assert_near(np.array(both.apply(x, weight)), summed, 1e-5)


def matrix(adapter: object, weight: np.ndarray) -> np.ndarray:
    if isinstance(adapter, Dora):
        summed = weight + np.array(adapter.scale * adapter.b @ adapter.a)
        return np.array(adapter.magnitude)[:, None] * summed / np.linalg.norm(summed, axis=1, keepdims=True)
    assert isinstance(adapter, Lokr)
    w2 = np.array(adapter.w2[0] if len(adapter.w2) == 1 else adapter.w2[0] @ adapter.w2[1])
    return weight + float(adapter.scale) * np.kron(np.array(adapter.w1), w2)


def test_lengths_are_those_of_quantized_weights(dev: Path, of: Callable) -> None:
    packed, exact = load(dev, 8), of(dev)
    for model in (packed, exact):
        lora.attach(model, KINDS["dora"], seed=0)
    case = case_for(packed)
    before = ours.velocity(packed, case)
    packed.adapters = {}
    np.testing.assert_array_equal(ours.velocity(packed, case), before)


def test_kinds_are_told_apart_by_compiled_functions() -> None:
    """They see a tree of arrays, nothing else of a kind."""
    square, row, one = mx.ones((4, 4)), mx.ones(4), mx.array(1.0)
    kinds = [
        Lora(square, square, one),
        Dora(square, square, one, row, row),
        Lokr(mx.ones((2, 2)), (mx.ones((2, 2)),), one),
        Lokr(mx.ones((2, 2)), (mx.ones((2, 1)), mx.ones((1, 2))), one),
    ]
    kinds += [kind.with_dropout((mx.random.key(0)[None], mx.array(0.5))) for kind in kinds]
    mx.enable_compile()
    apply = mx.compile(lambda x, kind, weight: kind.apply(x, weight))
    x = mx.random.normal((1, 3, 4))
    for kind in kinds:
        assert_near(np.array(apply(x, kind, square)), np.array(kind.apply(x, square)), 1e-6)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (128, 16, (16, 8)),
        (128, "auto", (8, 16)),
        (127, "auto", (1, 127)),
        (12, 5, (3, 4)),
        (30, 4, (3, 10)),
        (30, 6, (6, 5)),
    ],
)
def test_sides_of_kronecker_factors(size: int, factor: lokr.Factor, expected: tuple[int, int]) -> None:
    assert lokr.sides(size, factor) == expected


@pytest.mark.parametrize("kind", [*KINDS, "lora"])
def test_the_size_is_what_is_attached(dev: Path, of: Callable, kind: str) -> None:
    model, options = of(dev), KINDS.get(kind, LoraOptions(rank=3))
    lora.attach(model, options, seed=0)
    assert lora.size(model.spec, options) == sum(value.size for value in lora.parameters(model).values())
    assert set(model.adapters) <= set(block_linears(model.spec))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_are_near_and_float32(dev: Path, of: Callable, kind: str) -> None:
    exact, rough = of(dev), load_transformer(dev, of(dev).spec, 16)
    for model in (exact, rough):
        attach(model, KINDS[kind])
    case = case_for(exact)
    expected_loss, expected = ours.gradients(exact, case)
    loss, gradients = loss_and_gradients(rough, ours.batch(case), *ours.tensors(case, "sigma", "noise", "guidance"))
    assert float(loss) == pytest.approx(expected_loss, rel=0.03)
    assert {value.dtype for value in gradients.values()} == {mx.float32}
    for name, value in ours.numpy(gradients).items():
        assert np.linalg.norm(value - expected[name]) < 0.2 * np.linalg.norm(expected[name]), name
