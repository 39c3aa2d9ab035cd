"""The plan of training's memory against what MLX counts, and the decisions that follow from a budget."""

import gc
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import prod

import mlx.core as mx
import numpy as np
import pytest
from tiny.streaming import Prompt

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import quantize
from flux2_relay.stages.spec import DEV, TransformerSpec
from flux2_relay.stages.train import layout, lora, optimizer, step_work
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.batches import Draw, Item, Loaded
from flux2_relay.stages.train.layout import Layout
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import LoraOptions, MemoryOptions, TrainOptions
from flux2_relay.stages.train.residence import Resident
from flux2_relay.stages.train.shared_base import shared
from flux2_relay.stages.train.step import Asked, Terms, gradients_together
from flux2_relay.stages.train.step_work import Load
from flux2_relay.stages.train.transformer import Transformer, block_shapes, image_ids, outer_shapes, text_ids

SIDE, TEXT = 12, 48


def spec_of(width: int, double: int, single: int) -> TransformerSpec:
    return TransformerSpec(
        double_blocks=double,
        single_blocks=single,
        heads=width // 64,
        head_dim=64,
        rope_axes=(16, 16, 16, 16),
        context_width=96,
        guidance=False,
    )


SPECS = {"256 wide": spec_of(256, 2, 4), "384 wide": spec_of(384, 1, 3), "512 wide": spec_of(512, 2, 2)}
OPTIONS = LoraOptions(rank=4)
NUMBERS = np.random.default_rng(0).normal(0, 512**-0.5, 1 << 22).astype(np.float32)
"""All weights begin with these: drawing them took longer than the steps, which are what is measured."""


def load_of(spec: TransformerSpec, options: LoraOptions = OPTIONS) -> Load:
    return Load(
        batch=1,
        rows=TEXT + SIDE * SIDE,
        adapter_bytes=4 * lora.size(spec, options),
        adapter_copies=4,
        item_bytes=4,
        fused_attention=False,
        kind=options.kind,
    )


def random_model(spec: TransformerSpec, plan: Layout) -> Transformer:
    def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, quantize.Weight]:
        made: dict[str, quantize.Weight] = {}
        for name, shape in shapes.items():
            value = mx.array(NUMBERS[: prod(shape)].reshape(shape)) if len(shape) == 2 else mx.ones(shape)
            made[name] = quantize.pack(value, plan.bits) if len(shape) == 2 else value
            if plan.bits == 8:
                mx.eval(made[name])  # matrix by matrix, as `base.read` does it
        mx.eval(made)
        return made

    def read(place: int) -> dict[str, quantize.Weight]:
        return tensors(block_shapes(spec, place))

    residence = partial(Prompt, resident=plan.resident, ahead=plan.ahead) if plan.streamed else Resident
    model = Transformer(spec, mx.float32, tensors(outer_shapes(spec)), residence(spec.blocks, read))
    model.keep, model.attention_heads = plan.keep, plan.heads
    if plan.pieces is not None:
        model.pieces.ahead = plan.pieces
    return model


def measured(spec: TransformerSpec, plan: Layout, dropout: float = 0.0, options: LoraOptions = OPTIONS) -> int:
    """Peak of live arrays over two steps, from an empty memory."""
    gc.collect()  # models of tests before, which would go while this one is measured
    mx.clear_cache()
    before = mx.get_active_memory()
    model = random_model(spec, plan)
    lora.attach(model, options, seed=0)
    update = optimizer.Optimizer(TrainOptions(), lora.parameters(model))
    rows = SIDE * SIDE
    batch = Batch(
        latents=mx.random.normal((1, rows, 128)),
        context=mx.random.normal((1, TEXT, spec.context_width)),
        latent_ids=image_ids(SIDE, SIDE),
        text_ids=text_ids(TEXT),
    )
    mx.eval(batch.latents, batch.context)
    mx.reset_peak_memory()
    for step in range(2):
        dropping = lora.with_dropout(model, dropout, 0, step, [0])
        loss, gradients = loss_and_gradients(dropping, batch, mx.array([0.5]), mx.random.normal((1, rows, 128)), None)
        mx.eval(loss, gradients)
        gradients, _ = optimizer.clip(gradients, 1.0)
        lora.load(model, update.update(lora.parameters(model), gradients, step))
        del gradients
    model.residence.close()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("name", SPECS)
def test_the_plan_is_within_a_tenth_of_what_is_measured(name: str) -> None:
    """Three budgets each: room for everything, for the weights alone, and so little that blocks are streamed."""
    spec = SPECS[name]
    load = load_of(spec)
    resident = layout.predict(spec, load, 32, spec.blocks).peak_bytes
    streamed = layout.predict(spec, load, 32, 0).peak_bytes
    plans = [
        layout.choose(spec, load, MemoryOptions(bits=32), budget) for budget in (10 * resident, resident, streamed)
    ]
    assert [(plan.keep > 0, plan.streamed) for plan in plans] == [(True, False), (False, False), (False, True)]
    for plan in plans:
        assert measured(spec, plan) == pytest.approx(plan.peak_bytes, rel=0.1), plan.in_words()


def test_two_double_blocks_on_their_way_stay_under_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few rows the moment of the most is in the second double block, while the first one is read."""
    monkeypatch.setitem(globals(), "TEXT", 16)
    monkeypatch.setitem(globals(), "SIDE", 4)
    spec = spec_of(512, 2, 4)
    load = load_of(spec)
    plan = layout.choose(
        spec, load, MemoryOptions(bits=32, stream="always"), layout.predict(spec, load, 32, 0).peak_bytes
    )
    assert 0.9 < measured(spec, plan) / plan.peak_bytes <= 1.0, plan.in_words()


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_kinds_stay_under_their_plan(kind) -> None:
    spec, options = SPECS["256 wide"], LoraOptions(kind=kind, rank=4)
    load = load_of(spec, options)
    plan = layout.predict(spec, load, 32, spec.blocks)
    assert plan.peak_bytes > layout.predict(spec, replace(load, kind="lora"), 32, spec.blocks).peak_bytes
    assert 0.8 < measured(spec, plan, options=options) / plan.peak_bytes <= 1.0


def test_less_budget_means_fewer_bits_before_blocks_are_streamed() -> None:
    spec = SPECS["512 wide"]
    load = load_of(spec)
    full = layout.predict(spec, load, 32, spec.blocks).peak_bytes
    eight = layout.predict(spec, load, 8, spec.blocks).peak_bytes
    assert eight < full
    roomy, tight = (layout.choose(spec, load, MemoryOptions(stream="never"), budget) for budget in (full, eight))
    assert (roomy.bits, tight.bits) == (32, 8)
    assert layout.choose(spec, load, MemoryOptions(bits=32, stream="always"), 10 * full).resident == 0


def test_fewer_bits_are_tried_before_blocks_are_streamed_and_those_have_the_fewest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout.memory, "is_gpu", lambda: True)
    load = Load(batch=1, rows=1536, adapter_bytes=4 * 83_400_000, adapter_copies=4, item_bytes=2, fused_attention=True)
    plans = [layout.choose(DEV, load, MemoryOptions(), gib * 2**30) for gib in (80, 40, 24, 16, 10, 6)]
    assert [plan.bits for plan in plans] == [16, 8, 4, 4, 4, 4]
    assert [plan.streamed for plan in plans] == [False, False, False, True, True, True]
    assert all(before.resident >= after.resident for before, after in pairwise(plans))


def test_a_budget_that_nothing_fits_names_the_smallest_that_works() -> None:
    spec = SPECS["256 wide"]
    load = load_of(spec)
    with pytest.raises(InputError, match=r"memory\.budget: 1 MB is too little .* the least that works"):
        layout.choose(spec, load, MemoryOptions(), 1_000_000)


def test_kept_projections_take_what_is_left() -> None:
    spec = SPECS["256 wide"]
    load = load_of(spec)
    base = layout.predict(spec, load, 32, spec.blocks).peak_bytes
    one = step_work.kept_bytes(spec, load, spec.blocks - 1)
    keeps = [layout.choose(spec, load, MemoryOptions(bits=32), base + room).keep for room in (0, one - 1, one, 2 * one)]
    assert keeps == [0, 0, 1, 2]


@pytest.mark.parametrize("pieces", [1, 0])
@pytest.mark.parametrize("name", ["256 wide", "384 wide"])
def test_quantized_weights_made_dense_are_planned_for(name: str, pieces: int) -> None:
    spec = SPECS[name]
    plan = layout.predict(spec, load_of(spec), 8, spec.blocks, pieces=pieces)
    assert measured(spec, plan) == pytest.approx(plan.peak_bytes, rel=0.1), plan.in_words()


def test_fewer_pieces_in_flight_take_less_and_are_chosen_where_the_budget_asks_for_it() -> None:
    spec = SPECS["512 wide"]
    load = load_of(spec)
    usual, fewer = (layout.predict(spec, load, 32, spec.blocks, pieces=pieces) for pieces in (1, 0))
    assert fewer.peak_bytes < usual.peak_bytes
    options = MemoryOptions(bits=32, stream="never")
    roomy, tight = (layout.choose(spec, load, options, budget) for budget in (10**12, usual.peak_bytes - 1))
    assert (roomy.pieces, tight.pieces) == (1, 0)
    assert "1 piece in flight" in roomy.in_words()
    assert "0 pieces in flight" in tight.in_words()
    assert measured(spec, tight) == pytest.approx(tight.peak_bytes, rel=0.1)


def test_on_a_gpu_each_piece_less_is_a_dense_matrix_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.memory, "is_gpu", lambda: True)
    spec = SPECS["512 wide"]
    load = replace(load_of(spec), item_bytes=2, fused_attention=True)
    plans = [layout.predict(spec, load, 8, spec.blocks, pieces=pieces) for pieces in (3, 2, 1)]
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    chosen = [layout.choose(spec, load, MemoryOptions(bits=8, stream="never"), peak) for peak in peaks]
    assert [plan.pieces for plan in chosen] == [3, 2, 1]
    matrix = 2 * spec.hidden * (3 * spec.hidden + 2 * spec.mlp_width)
    assert plans[0].parts["dense copies"] - plans[1].parts["dense copies"] == pytest.approx(matrix, abs=1)


def test_masks_of_dropout_are_planned_for() -> None:
    spec = SPECS["512 wide"]
    without = layout.predict(spec, load_of(spec), 32, spec.blocks)
    plan = layout.predict(spec, replace(load_of(spec), dropout=True), 32, spec.blocks)
    rows = TEXT + SIDE * SIDE
    assert plan.peak_bytes - without.peak_bytes == 5 * rows * (spec.hidden + spec.mlp_width)
    assert measured(spec, plan, dropout=0.3) == pytest.approx(plan.peak_bytes, rel=0.1)


def measured_together(spec: TransformerSpec, plan: Layout, runs: int) -> int:
    """Peak of live arrays over two steps of several trainings over one base, from an empty memory."""
    gc.collect()  # models of tests before, which would go while this one is measured
    mx.clear_cache()
    before = mx.get_active_memory()
    model = shared(random_model(spec, plan))
    models = [replace(model, adapters={}, joins=plan.joined) for _ in range(runs)]
    for number, one in enumerate(models):
        lora.attach(one, OPTIONS, seed=number)
    updates = [optimizer.Optimizer(TrainOptions(), lora.parameters(one)) for one in models]
    rows = SIDE * SIDE
    batch = Batch(
        latents=mx.random.normal((1, rows, 128)),
        context=mx.random.normal((1, TEXT, spec.context_width)),
        latent_ids=image_ids(SIDE, SIDE),
        text_ids=text_ids(TEXT),
    )
    mx.eval(batch.latents, batch.context)
    mx.reset_peak_memory()
    for step in range(2):
        loaded = Loaded(step, [([Draw(0, Item("", "", (SIDE, SIDE), ("",)), "")], batch)], 0.0)
        found = gradients_together([Asked(one, loaded, Terms(n, TrainOptions(), 0.0)) for n, one in enumerate(models)])
        for one, update in zip(models, updates, strict=True):
            gradients, _ = optimizer.clip(found.pop(0)[1], 1.0)
            lora.load(one, update.update(lora.parameters(one), gradients, step))
            del gradients
    model.residence.close()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(("bits", "resident", "kept"), [(32, 4, 0), (32, 4, 10**9), (32, 0, 0), (8, 4, 0)])
def test_the_plan_of_runs_together_is_within_a_tenth_of_what_is_measured(bits: int, resident: int, kept: int) -> None:
    spec = SPECS["384 wide"]
    loads = [load_of(spec)] * 3
    budget = layout.predict_together(spec, loads, bits, resident).peak_bytes + kept
    stream = "never" if resident else "always"
    plan = layout.choose(spec, loads, MemoryOptions(bits=bits, stream=stream), budget)  # pyright: ignore[reportArgumentType]
    assert (plan.keep > 0, plan.resident) == (kept > 0, resident)
    assert measured_together(spec, plan, 3) == pytest.approx(plan.peak_bytes, rel=0.1), plan.in_words()


@pytest.mark.parametrize(("bits", "resident"), [(32, 4), (8, 0)])
def test_so_is_the_plan_of_runs_whose_passes_are_one_batch(bits: int, resident: int) -> None:
    spec = SPECS["384 wide"]
    loads = [load_of(spec)] * 3
    plan = layout.predict_together(spec, loads, bits, resident, joined=True)
    assert (
        plan.parts["one block's work"] == 3 * layout.predict(spec, loads[0], bits, resident).parts["one block's work"]
    )
    assert measured_together(spec, plan, 3) == pytest.approx(plan.peak_bytes, rel=0.1), plan.in_words()


def test_passes_are_one_batch_on_a_gpu_where_memory_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["384 wide"]
    loads, options = [load_of(spec)] * 3, MemoryOptions(bits=32, stream="never")
    assert not layout.choose(spec, loads, options, 10**12).joined
    monkeypatch.setattr(layout.memory, "is_gpu", lambda: True)
    joined, apart = (layout.predict_together(spec, loads, 32, spec.blocks, joined=of) for of in (True, False))
    assert layout.choose(spec, loads, options, joined.peak_bytes).joined
    assert not layout.choose(spec, loads, options, joined.peak_bytes - 1).joined
    assert apart.peak_bytes < joined.peak_bytes
    assert not layout.choose(spec, [replace(load, kind="dora") for load in loads], options, 10**12).joined
    assert not layout.choose(spec, loads[:1], options, 10**12).joined
    mixed = [loads[0], replace(loads[0], dropout=True), loads[0]]
    plan = layout.predict_together(spec, mixed, 32, spec.blocks, joined=True)
    assert apart.peak_bytes < plan.peak_bytes < joined.peak_bytes
