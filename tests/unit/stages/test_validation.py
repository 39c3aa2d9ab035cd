"""Which pictures are held out, and that their loss is the model's."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import cases, ours

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.train import lora, validation
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.objective import Batch


def body(ids: Sequence[str], prior: Sequence[str] = ()) -> dict:
    return {
        "prompts": ["p"],
        "samples": [{"id": name, "prior": False} for name in ids] + [{"id": name, "prior": True} for name in prior],
    }


def held(ids: Sequence[str], fraction: float) -> set[str]:
    trained, kept = validation.split(body(ids), fraction)
    assert [s["id"] for s in trained["samples"]] == [name for name in ids if name not in ids_of(kept)]
    assert trained["prompts"] == ["p"]
    return ids_of(kept)


def ids_of(part) -> set[str]:
    return {sample["id"] for sample in part["samples"]}


NAMES = [f"{n}.png" for n in range(2000)]


def test_the_share_is_held_out() -> None:
    assert held(NAMES, 0.0) == set()
    assert abs(len(held(NAMES, 0.1)) - 200) < 50


def test_pictures_that_come_later_move_none() -> None:
    before = held(NAMES[:500], 0.1)
    assert len(before) > 10
    assert held(NAMES, 0.1) & set(NAMES[:500]) == before
    assert held(NAMES[:500], 0.2) > before


def test_at_least_one_is_held_out() -> None:
    assert len(held(NAMES[:2], 0.001)) == 1


def test_all_of_a_picture_is_held_out() -> None:
    """Twice in the data set, as with a second crop of it."""
    _, kept = validation.split(body(NAMES[:100] * 2), 0.1)
    assert len(kept["samples"]) == 2 * len(ids_of(kept))


def test_prior_pictures_are_trained_on() -> None:
    trained, kept = validation.split(body(NAMES[:50], prior=[f"prior/{n}" for n in range(200)]), 0.5)
    assert not any(name.startswith("prior/") for name in ids_of(kept))
    assert len(ids_of(trained)) > 200


def test_nothing_left_to_train_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"validation\.fraction: 0\.99"):
        validation.split(body(["a", "b"]), 0.99)


@pytest.mark.parametrize("references", [False, True])
def test_the_loss_alone_is_that_of_the_gradients(dev: Path, references: bool) -> None:
    model = ours.load(dev)
    lora.attach(model, LoraOptions(rank=2, targets="attention"), seed=0)
    shapes = {name: value.shape for name, value in lora.parameters(model).items()}
    lora.load(model, {name: mx.array(value) for name, value in cases.adapter(shapes, seed=1).items()})
    case = cases.draw(model.spec.context_width, seed=2, text=9, grids=((2, 3),), guidance=(1.0, 3.5))
    batch = ours.batch(case)
    if references:
        batch["references"] = mx.ones((2, 4, 128))
        batch["reference_ids"] = mx.zeros((4, 4), mx.int32)
        batch["mask"] = mx.array([[1.0, 0, 1, 0, 1, 1]] * 2)
    arguments = ours.tensors(case, "sigma", "noise", "guidance")
    expected, _ = loss_and_gradients(model, batch, *arguments)
    found = validation.loss_alone(model, Batch(**batch), *arguments)
    assert found == pytest.approx(expected.item(), rel=1e-6)
