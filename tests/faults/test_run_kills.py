"""Training with everything on, killed at random moments and started again: the bits of a run that nobody killed."""

import random
from collections.abc import Callable

import pytest
from faults import torture_train
from tiny.project import Project


@pytest.fixture(autouse=True)
def _plain(_uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


def test_killed_at_random_it_ends_with_the_same_bits(encoded: Callable[..., Project]) -> None:
    """`make torture` kills more often, and with every optimizer."""
    changes = torture_train.everything("prodigy")
    whole, broken = (encoded(**changes) for _ in "ab")
    outcome = whole.relay("train")
    assert outcome.status == 0, outcome.said
    dice = random.Random(7)
    for _ in range(3):
        assert torture_train.kill_once(broken, dice)
        assert not (broken.run / "adapter.safetensors").exists()
    torture_train.kill_behind_a_checkpoint(broken)
    torture_train.finish(broken)
    assert torture_train.differences(broken, whole) == []
    assert {"adapter_ema.safetensors", "validation.jsonl", "previews"} <= {path.name for path in whole.run.iterdir()}
    assert not list((broken.run / "checkpoints").glob(".new-*"))


def test_a_difference_would_show(encoded: Callable[..., Project]) -> None:
    """Another seed, and a line of metrics that is not the same."""
    one, other = (encoded(**torture_train.everything("lion"), run={"seed": seed}) for seed in (1, 2))
    for project in (one, other):
        assert project.relay("train", "--max-steps", 4).status == 0
    found = torture_train.differences(one, other)
    assert {"metrics.jsonl", "validation.jsonl", "adapter.safetensors", "adapter_ema.safetensors"} <= set(found)
