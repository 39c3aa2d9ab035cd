"""Warnings that save a night: each is said where it applies, and nothing is said of the usual."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from tiny.project import Project

from flux2_relay.stages.catalogue import CATALOGUE
from flux2_relay.stages.train import warnings
from flux2_relay.stages.train.batches import Item
from flux2_relay.stages.train.options import LoraOptions, SaveOptions, TrainOptions

BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t80%; discharging; present: true\n"
MAINS = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t100%; charged; 0:00 remaining present: true\n"
SLEPT = "2026-01-02 03:04:05 +0000 Notification        \tDisplay is turned off                    \t           \n"
WOKE = "2026-01-02 05:04:05 +0000 Notification        \tDisplay is turned on                     \t           \n"


def said(train: TrainOptions | None = None, lora: LoraOptions | None = None) -> str:
    return "\n".join(warnings.of_options(train or TrainOptions(), lora or LoraOptions()))


def test_the_usual_is_not_worth_a_word() -> None:
    assert said() == ""
    assert said(TrainOptions(optimizer="prodigy", lr=1.0)) == ""
    assert said(TrainOptions(lr=4e-4), LoraOptions(rank=128, alpha=128)) == ""
    assert said(None, LoraOptions(rank=32, alpha=16)) == ""


@pytest.mark.parametrize(("lr", "optimizer"), [(5e-3, "adamw"), (1e-9, "adafactor"), (1e-3, "lion")])
def test_learning_rates_far_outside_the_customary(lr: float, optimizer: str) -> None:
    text = said(TrainOptions(lr=lr, optimizer=optimizer))  # pyright: ignore
    assert f"train.lr is {lr:g}; with {optimizer} people train" in text


def test_no_rate_wide_ranks_and_odd_scales() -> None:
    assert "train.lr is 0" in said(TrainOptions(lr=0.0))
    assert "lora.rank is 512" in said(None, LoraOptions(rank=16, ranks={"to_q": 512}))
    assert "a weak LoRA" in said(None, LoraOptions(rank=32, alpha=1))
    assert "too high" in said(None, LoraOptions(rank=2, alpha=32))


def test_a_distilled_klein_is_and_dev_and_base_are_not() -> None:
    found = {name: warnings.of_model(*CATALOGUE[name]) for name in CATALOGUE}
    assert {name for name, sentences in found.items() if sentences} == {"klein-4b", "klein-9b"}
    assert "train on the base model" in found["klein-4b"][0]


def pictures(*counts: int) -> list[Item]:
    return [Item(f"{n}-{i}", "key", (n + 1, 1), ("caption",)) for n, count in enumerate(counts) for i in range(count)]


def test_data_too_small_for_the_batch() -> None:
    few = warnings.of_data(pictures(5, 3, 9), TrainOptions(batch=4))
    assert "1 of 3 buckets hold fewer pictures (the smallest 3)" in few[0]
    assert "an update takes 8 pictures" in warnings.of_data(pictures(4), TrainOptions(batch=4, accumulate=2))[0]
    assert warnings.of_data(pictures(4, 4), TrainOptions(batch=4, accumulate=2)) == []


def test_a_disk_that_fills_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = warnings.run_bytes(1000, TrainOptions(ema=0.9), SaveOptions(every=10, keep=3), left=100)
    assert needed == 4 * 1000 * (4 * (1 + 2 + 1) + 2)  # keep + 1 checkpoints: adapter, two moments, mean
    assert warnings.run_bytes(1000, TrainOptions(), SaveOptions(every=80, keep=9), left=100) == 4 * 1000 * (3 * 3 + 1)
    assert warnings.run_bytes(1000, TrainOptions(), SaveOptions(), left=0) == 0

    def with_free(free: int) -> list[str]:
        monkeypatch.setattr(warnings.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
        return warnings.of_disk(tmp_path / "runs/new", needed)

    assert with_free((1 << 30) + needed) == []
    assert "the disk will be full before the end" in with_free((1 << 30) + needed - 1)[0]
    written = tmp_path / "runs/new/checkpoints/000010"
    written.mkdir(parents=True)
    (written / "adapter.safetensors").write_bytes(b"0" * 100)
    assert with_free((1 << 30) + needed - 100) == []  # what is there already is part of what is needed


@pytest.fixture
def pmset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A `pmset` on the PATH that answers this to `-g batt` and `-g log`."""

    def put(batt: str, log: str) -> None:
        for name, text in (("batt", batt), ("log", log)):
            (tmp_path / name).write_text(text)
        script = tmp_path / "bin/pmset"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\ncat "{tmp_path}/$2"\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    return put


@pytest.mark.parametrize(
    ("batt", "log", "words"),
    [
        (MAINS, WOKE + SLEPT, []),
        (BATTERY, WOKE + SLEPT, ["battery"]),
        (MAINS, SLEPT + WOKE, ["the display is on"]),
        (BATTERY, SLEPT + WOKE, ["battery", "the display is on"]),
        ("", "", []),
    ],
)
def test_what_powers_a_mac_and_whether_its_display_is_on(pmset, batt: str, log: str, words: list[str]) -> None:
    pmset(batt, log)
    found = warnings.power()
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_elsewhere_and_where_nothing_answers_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert warnings.power() == []
    (tmp_path / "pmset").write_text("#!/bin/sh\n/bin/sleep 9\n")
    (tmp_path / "pmset").chmod(0o755)
    monkeypatch.setattr(warnings, "_PATIENCE", 0.05)
    assert warnings.power() == []


def test_b_that_is_still_zero() -> None:
    values = {"x.lora_A.weight": mx.ones(2), "x.lora_B.weight": mx.zeros(2), "y.lora_B.weight": mx.ones(2)}
    assert "1 of 2 modules, e.g. x.lora_B.weight" in str(warnings.of_adapter(values))
    assert "every module" in str(warnings.of_adapter({"x.lora_B.weight": mx.zeros(2)}))
    of_lokr = {"x.lokr_w1": mx.ones(2), "x.lokr_w2_a": mx.ones(2), "x.lokr_w2_b": mx.zeros(2), "y.lokr_w2": mx.ones(2)}
    assert "1 of 2 modules, e.g. x.lokr_w2_b" in str(warnings.of_adapter(of_lokr))
    assert warnings.of_adapter({"x.lora_A.weight": mx.zeros(2), "x.lora_B.weight": mx.ones(2)}) is None


def test_plan_and_train_say_them(encoded: Callable[..., Project]) -> None:
    project = encoded(train={"lr": 0.0, "steps": 21, "batch": 4, "dtype": "float32"}, previews={"every": 0})
    planned, trained = project.relay("plan"), project.relay("train")
    assert (planned.status, trained.status) == (0, 0), planned.said + trained.said
    for outcome in (planned, trained):
        assert "warning: train.lr is 0: nothing is learned" in " ".join(outcome.said.split())
        assert "warning: train.batch is 4, but" in " ".join(outcome.said.split())
    assert "after 20 steps a factor is still zero in every module" in trained.said
    assert "a factor is still zero" in (project.run / "log.txt").read_text()
