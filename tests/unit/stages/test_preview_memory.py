"""Previews that are larger than the pictures trained on have the peak of a run: the plan knows it."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest
from tiny.streaming import Prompt

from flux2_relay.stages import one_model
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import forward_work, layout, lora, optimizer, sample
from flux2_relay.stages.train.options import LoraOptions, MemoryOptions, PreviewOptions, PromptOptions, TrainOptions
from flux2_relay.stages.train.residence import Resident
from flux2_relay.stages.train.step_work import Load
from flux2_relay.stages.train.transformer import Transformer, block_shapes, outer_shapes

TEXT, SIDE, PREVIEW = 48, 12, 28
SPEC = TransformerSpec(
    double_blocks=2, single_blocks=4, heads=4, head_dim=64, rope_axes=(16, 16, 16, 16), context_width=96, guidance=False
)
OPTIONS = LoraOptions(rank=4)
LOAD = Load(
    batch=1,
    rows=TEXT + SIDE * SIDE,
    adapter_bytes=4 * lora.size(SPEC, OPTIONS),
    adapter_copies=4,
    item_bytes=4,
    fused_attention=False,
    drawn_rows=TEXT + PREVIEW * PREVIEW,
)


def measured(resident: int) -> int:
    """Peak of live arrays over a preview between two steps, from an empty memory."""

    def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
        made = {name: mx.random.normal(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
        mx.eval(made)
        return made

    gc.collect()  # models of tests before, which would go while this one is measured
    mx.clear_cache()
    before = mx.get_active_memory()
    residence = Resident if resident == SPEC.blocks else partial(Prompt, resident=resident)
    blocks = residence(SPEC.blocks, lambda place: tensors(block_shapes(SPEC, place)))
    model = Transformer(SPEC, mx.float32, tensors(outer_shapes(SPEC)), blocks)
    lora.attach(model, OPTIONS, seed=0)
    update = optimizer.Optimizer(TrainOptions(), lora.parameters(model))
    gradients = lora.parameters(model)  # those of the step before are still there
    picture = sample.Picture(
        context=mx.random.normal((TEXT, SPEC.context_width)),
        negative=None,
        height=PREVIEW,
        width=PREVIEW,
        seed=0,
        steps=1,
        guidance=1.0,
    )
    mx.reset_peak_memory()
    sample.draw(model, picture)
    blocks.close()
    del update, gradients
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("resident", [SPEC.blocks, 0])
def test_the_plan_is_within_a_tenth_of_what_is_measured(resident: int) -> None:
    step = layout.predict(SPEC, replace(LOAD, drawn_rows=0), 32, resident)
    plan = layout.predict(SPEC, LOAD, 32, resident)
    assert plan.peak_bytes > 1.2 * step.peak_bytes
    assert "larger previews" in plan.in_words()
    assert "larger previews" not in step.in_words()
    assert measured(resident) == pytest.approx(plan.peak_bytes, rel=0.1), plan.in_words()


def test_what_a_step_keeps_is_gone_when_they_are_drawn() -> None:
    least = layout.predict(SPEC, LOAD, 32, SPEC.blocks).peak_bytes
    plan = layout.choose(SPEC, LOAD, MemoryOptions(bits=32, stream="never"), least)
    assert plan.keep > 0
    assert 0.9 * least < plan.peak_bytes <= least


def test_small_ones_take_nothing() -> None:
    without, small = (layout.predict(SPEC, replace(LOAD, drawn_rows=rows), 32, SPEC.blocks) for rows in (0, TEXT + 16))
    assert small.parts == without.parts


def test_several_runs_draw_one_after_another() -> None:
    one, two = (layout.predict_together(SPEC, [LOAD] * runs, 32, SPEC.blocks) for runs in (1, 2))
    assert two.parts["larger previews"] < one.parts["larger previews"]  # of two runs more is gone by then


def test_the_largest_and_its_references_count() -> None:
    def rows(*prompts: PromptOptions | str, every: int = 1) -> int:
        return forward_work.preview_rows(PreviewOptions(every=every, prompts=prompts, size=(64, 32)), TEXT)

    assert rows() == rows("x", every=0) == 0
    assert rows("x") == TEXT + 8
    assert rows("x", PromptOptions(prompt="y", size=(64, 64))) == TEXT + 16
    assert rows(PromptOptions(prompt="y", references=("a.png", "b.png"))) == TEXT + 24


def test_a_run_with_them_stays_under_its_plan(encoded: Callable) -> None:
    project = encoded(previews={"every": 6, "prompts": ["a blue dog"], "size": [256, 256], "steps": 1})
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    turn = one_model.turns[-1]
    assert turn.predicted_bytes is not None
    assert 0.7 * turn.predicted_bytes < turn.peak_bytes - turn.before_bytes <= turn.predicted_bytes, outcome.said
