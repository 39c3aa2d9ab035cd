"""Runs of DoRA and LoKr from `relay train` to a merged model: broken and unbroken, exported, merged."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, comfyui, ours
from tiny.project import Project, relay

from flux2_relay.stages import spec
from flux2_relay.stages.train import adapter_file, mixing, visits
from flux2_relay.stages.train.transformer import Transformer, block_linears

KINDS = {
    "dora": {"kind": "dora", "rank": 2, "dropout": 0.2},
    "lokr": {"kind": "lokr", "rank": 2, "factor": 4, "ranks": {"to_k": 3}},
}
REST = {
    "train": {"lr": 0.02, "steps": 3, "ema": 0.9},
    "save": {"every": 1, "keep": 9, "dtype": "float32"},
    "previews": {"every": 0},
}


def arrays(file: Path) -> dict[str, mx.array]:
    values = mx.load(str(file))
    assert isinstance(values, dict)
    return values


def weights(model: Transformer) -> dict[str, np.ndarray]:
    return {path: np.array(weight) for path, weight in visits.linears(model, block_linears(model.spec))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_exact_under_resume_and_its_adapter_goes_everywhere(
    encoded: Callable[..., Project], tmp_path: Path, kind: str
) -> None:
    whole, broken = (encoded(**REST, lora=KINDS[kind]) for _ in "ab")
    assert whole.relay("train").status == 0
    for count in (1, 2):
        assert broken.relay("train", "--max-steps", count).status == 0
    files = [f"checkpoints/000003/{name}.safetensors" for name in ("adapter", "optimizer", "ema")]
    for name in (*files, "adapter.safetensors", "adapter_ema.safetensors"):
        one, other = arrays(whole.run / name), arrays(broken.run / name)
        assert one.keys() == other.keys()
        assert all(mx.array_equal(value, other[key]) for key, value in one.items()), name

    out, merged = tmp_path / "out.safetensors", tmp_path / "merged"
    exported = relay("export", whole.run, "--format", "comfyui", "-o", out)
    assert exported.status == 0, exported.said
    again = relay("export", whole.run / "adapter.safetensors", "--format", "comfyui", "-o", tmp_path / "b.safetensors")
    assert again.status == 0, again.said
    refused = relay("export", whole.run, "--format", "kohya", "-o", tmp_path / "c.safetensors")
    assert refused.status == 2
    assert "--format kohya cannot carry these modules" in refused.said
    outcome = relay("merge", "-c", whole.config, "--adapter", whole.run, "--dtype", "float32", "-o", merged)
    assert outcome.status == 0, outcome.said

    base, found = ours.load(whole.model), weights(ours.load(merged))
    for path, weight in comfyui.loaded(out, weights(base)).items():
        np.testing.assert_allclose(found[path], weight, rtol=0, atol=1e-5 * np.abs(weight).max(), err_msg=path)
    sizes = spec.read_transformer_spec(whole.model / "transformer")
    drawn = mixing.mix([mixing.measured(adapter_file.read(whole.run / "adapter.safetensors", sizes), base)], [1.0])
    case = cases.draw(sizes.context_width, guidance=[2.0], seed=1, sigma=(0.4,))
    before, expected = ours.velocity(base, case), ours.velocity(ours.load(merged), case)
    base.adapters = drawn
    assert np.abs(ours.velocity(base, case) - expected).max() <= 5e-5 * np.abs(expected - before).max()


def test_lengths_that_an_export_must_divide_anew_take_the_base(encoded: Callable[..., Project], tmp_path: Path) -> None:
    """A checkpoint under peft's names, as a file: without `-c` nobody knows the base."""
    project = encoded(**REST, lora=KINDS["dora"])
    assert project.relay("train", "--max-steps", 1).status == 0
    file = project.run / "checkpoints/000001/adapter.safetensors"
    refused = relay("export", file, "--format", "comfyui", "-o", tmp_path / "a.safetensors")
    assert refused.status == 2
    assert "name the base model with -c FILE" in refused.said
    outcome = relay("export", file, "--format", "comfyui", "-o", tmp_path / "a.safetensors", "-c", project.config)
    assert outcome.status == 0, outcome.said
