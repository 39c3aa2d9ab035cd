"""Ranks without processes: who does which passes, how a launch is recognised, what must be the same everywhere."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.stages.train import agreement, ranks, step
from flux2_relay.stages.train.batches import Batches, Loaded
from flux2_relay.stages.train.options import LoraOptions, SaveOptions, TrainOptions, ValidationOptions

BODY = {
    "shared": {"empty": "e"},
    "samples": [
        {
            "id": f"{n}",
            "text": [f"t{n}"],
            "latents": [{"key": f"l{n}", "h": 4, "w": 4 + 2 * (n % 2), "references": [], "mask": None}],
            "repeats": 1,
            "prior": False,
        }
        for n in range(5)
    ],
}


def test_a_process_alone_changes_nothing() -> None:
    group, loss, gradients = ranks.ALONE, mx.array(1.0), {"a": mx.ones(3)}
    assert group.average(loss, gradients) == (loss, gradients)
    assert group.average(loss, gradients)[1] is gradients
    assert (group.any(True), group.any(False)) == (True, False)
    assert group.follow(gradients)["a"] is gradients["a"]
    group.check({"anything": "at all"})
    assert group.waits == ranks.Waits()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_out_the_passes_of_one_that_accumulates(size: int) -> None:
    options = TrainOptions(batch=2, accumulate=6 // size, caption_dropout=0.3)
    alone = Batches(BODY, TrainOptions(batch=2, accumulate=6, caption_dropout=0.3), 3)
    shared = Batches(BODY, options, 3, size)
    for number in range(4):
        dealt = [shared.at(number)[ranks.Group(rank, size).share] for rank in range(size)]
        assert all(len(of_rank) == options.accumulate for of_rank in dealt)
        passes = sorted((p for of_rank in dealt for p in of_rank), key=lambda draws: draws[0].place)
        assert passes == alone.at(number)


def test_the_sigmas_of_all_ranks_are_known_to_each() -> None:
    options = TrainOptions(batch=2, accumulate=2)
    whole = Batches(BODY, options, 3).at(5)
    found = step.sigmas_of(Loaded(5, [], 0.0, whole), step.Terms(3, options, 0.0))
    expected = [
        step.objective.draw(3, 5, drawn.place, (drawn.item.size[0] * drawn.item.size[1], 8), options)[0]
        for draws in whole
        for drawn in draws
    ]
    assert found == expected


def _launches(folder: Path) -> dict[str, tuple[dict[str, str], str | None]]:
    filled, empty = folder / "filled.json", folder / "empty.json"
    filled.write_text("[]")
    empty.write_text("\n")
    return {
        "nothing": ({}, None),
        "mlx.launch over ring": ({"MLX_RANK": "1", "MLX_HOSTFILE": str(filled)}, "ring"),
        "mlx.launch of one rank": ({"MLX_RANK": "0", "MLX_HOSTFILE": str(empty)}, None),
        "mlx.launch over jaccl": ({"MLX_RANK": "1", "MLX_IBV_DEVICES": str(filled)}, "jaccl"),
        "mlx.launch over nccl": ({"MLX_RANK": "0", "NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "2"}, "nccl"),
        "nccl of one": ({"MLX_RANK": "0", "NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "1"}, None),
        "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpi"),
        "mpiexec": ({"PMI_SIZE": "2"}, "mpi"),
        "srun of one task": ({"PMI_SIZE": "1"}, None),
    }


def test_how_a_process_was_launched_is_recognised(tmp_path: Path) -> None:
    for name, (environment, backend) in _launches(tmp_path).items():
        assert ranks.launched_with(environment) == backend, name


def test_pieces_hold_every_value_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_PIECE", 40)
    values = [mx.zeros(n) for n in (1, 4, 30, 2, 2, 2)]
    pieces = list(ranks._pieces(values))
    assert [[value.size for value in piece] for piece in pieces] == [[1, 4, 30], [2, 2, 2]]
    assert [value for piece in pieces for value in piece] == values


def test_facts_that_differ_are_named_with_the_ranks() -> None:
    rows = np.array([[[1, 2], [3, 4]], [[1, 2], [3, 5]], [[9, 2], [3, 4]]])
    found = ranks.differing(rows, {"the set": "s" * 200, "run.seed": "7"})
    assert found == [
        "the set of rank 2 is another than that of rank 0",
        "run.seed of rank 1 is another than that of rank 0 (here: 7)",
    ]


class Listener:
    """A group that only keeps what is checked."""

    is_alone = False

    def __init__(self) -> None:
        self.facts: Mapping[str, str] = {}

    def check(self, facts: Mapping[str, str]) -> None:
        self.facts = facts


def _facts(**changes: Any) -> Mapping[str, str]:
    group = Listener()
    job = SimpleNamespace(
        lora=LoraOptions(),
        train=TrainOptions(),
        validation=ValidationOptions(),
        save=SaveOptions(),
        record=SimpleNamespace(body=BODY),
        seed=0,
        max_steps=None,
        group=group,
    )
    layout: Any = SimpleNamespace(stored=None, bits=changes.pop("bits", 8))
    spec: Any = changes.pop("spec", "spec")
    for name, value in changes.items():
        setattr(job, name, value)
    agreement.check(job, spec, layout)  # pyright: ignore[reportArgumentType]
    return group.facts


CHANGES = {
    "the set (pictures, captions, or how they were encoded)": {
        "record": SimpleNamespace(body={**BODY, "samples": BODY["samples"][1:]})
    },
    "the model's shape": {"spec": "another"},
    "the width of the model's weights (memory.bits)": {"bits": 4},
    "what the sections lora and train say": {"train": TrainOptions(lr=1.0)},
    "run.seed": {"seed": 1},
    "validation.fraction": {"validation": ValidationOptions(fraction=0.5)},
    "save.every": {"save": SaveOptions(every=7)},
    "--max-steps": {"max_steps": 3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_fact_follows_what_it_is_about(name: str) -> None:
    usual, changed = _facts(), _facts(**CHANGES[name])
    assert [fact for fact in usual if usual[fact] != changed[fact]] == [name]
    assert set(usual) == {*CHANGES, "the release of this program"}


def test_other_weights_outside_the_blocks_are_noticed() -> None:
    def digest(weight: mx.array | tuple[mx.array, ...]) -> Mapping[str, str]:
        group: Any = Listener()
        transformer: Any = SimpleNamespace(outer={"proj_out": weight, "x_embedder": mx.ones((2, 2), mx.bfloat16)})
        agreement.check_weights(group, transformer)
        return group.facts

    one = mx.ones((2, 2))
    assert digest(one) == digest(mx.ones((2, 2)))
    assert digest(one) != digest(one + 1e-6)
    assert digest((one, one)) != digest((one, one + 1))


def test_every_option_of_ranks_is_in_a_fact() -> None:
    """A key of these sections that is added later is compared, too."""
    for options in (LoraOptions(), TrainOptions()):
        names = [field.name for field in dataclasses.fields(options)]
        assert all(f'"{name}"' in _facts()["what the sections lora and train say"] for name in names)
