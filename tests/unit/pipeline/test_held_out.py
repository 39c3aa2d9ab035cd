"""The held-out loss on the page of a run: its curve, the mark of the best checkpoint, what lines it survives."""

import json
from pathlib import Path

import numpy as np
import pytest

from flux2_relay.pipeline import held_out
from flux2_relay.pipeline.config import load_config
from flux2_relay.pipeline.report import write_report
from flux2_relay.pipeline.run_folder import RunFolder

SIGMAS = [0.1, 0.5, 0.9]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "fox").mkdir()
    return RunFolder(tmp_path / "fox")


def validated(run: RunFolder, losses: dict[int, float], best: int | None = None, tail: str = "") -> None:
    lines = [
        {"step": step, "loss": loss, "sigma": SIGMAS, "pictures": 2, "loss_by_sigma": [loss - 0.1, loss, loss + 0.1]}
        for step, loss in losses.items()
    ]
    run.validation.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    if best is not None:
        (run.checkpoints / f"{best:06d}").mkdir(parents=True)
        (run.checkpoints / "best").write_text(f"{best:06d}\n")


def page(run: RunFolder) -> str:
    (run.path / "config.yaml").write_text(
        f"run: {{name: fox, dir: {run.path.parent}}}\nmodel: {{path: m}}\ndata: {{path: d}}\ntrain: {{steps: 4}}\n"
    )
    step = {"loss": 1.0, "lr": 1e-4, "grad_norm": 0.5, "sigma": [0.5], "seconds": 2.0, "wait_seconds": 0.0}
    lines = [json.dumps({"step": n, **step, "peak_bytes": 1000}) + "\n" for n in range(1, 5)]
    run.metrics.write_text("".join(lines))
    return write_report(run, load_config(run.path / "config.yaml")).read_text("utf-8")


def test_the_curve_and_the_best_checkpoint_are_drawn(run: RunFolder) -> None:
    validated(run, {0: 1.0, 2: 0.6, 4: 0.8}, best=2)
    text = page(run)
    assert "held-out loss 1 → 0.6 at its best, step 2" in text
    assert "<b>Held-out loss</b>" in text
    assert "mean over 2 pictures at 3 sigmas" in text
    assert "best checkpoint, step 2" in text
    assert "<b>Held-out loss by sigma</b>" in text
    found = held_out.read(run)
    assert found is not None
    curve, mark = held_out.curve(found).series
    assert (list(curve.x), list(curve.y)) == ([0, 2, 4], [1.0, 0.6, 0.8])
    assert (list(mark.x), list(mark.y)) == ([2], [0.6])
    before, after = held_out.by_sigma(found).series
    np.testing.assert_allclose(before.y, [0.9, 1.0, 1.1])
    np.testing.assert_allclose(after.y, [0.5, 0.6, 0.7])


def test_a_run_that_holds_nothing_out_has_no_such_chart(run: RunFolder) -> None:
    assert "eld-out" not in page(run)
    assert held_out.read(run) is None


def test_a_mark_without_its_checkpoint_is_not_drawn(run: RunFolder) -> None:
    validated(run, {0: 1.0, 2: 0.6}, best=2)
    (run.checkpoints / "000002").rmdir()
    text = page(run)
    assert "best checkpoint" not in text
    assert "held-out loss 1 → 0.6" in text


@pytest.mark.parametrize("tail", ['{"step": 6, "lo', '{"step": 6, "loss": null, "sigma": [], "loss_by_sigma": []}\n'])
def test_lines_that_are_not_whole_are_left_out(run: RunFolder, tail: str) -> None:
    validated(run, {0: 1.0, 2: 0.6}, tail=tail)
    found = held_out.read(run)
    assert found is not None
    assert list(found.step) == [0, 2]
    assert found.best is None
    assert "held-out loss 1 → 0.6" in page(run)


def test_the_untrained_adapter_alone_is_one_dot(run: RunFolder) -> None:
    validated(run, {0: 1.25})
    assert "held-out loss 1.25" in page(run)
    found = held_out.read(run)
    assert found is not None
    assert len(held_out.by_sigma(found).series) == 1
