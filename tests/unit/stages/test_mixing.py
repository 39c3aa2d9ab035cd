"""Adapters at strengths: against weights merged by hand, and at strength 0 against the base bit for bit."""

# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import adapters, cases, ours
from tiny.compare import assert_near, relative_error

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import names, spec
from flux2_relay.stages.train import mixing
from flux2_relay.stages.train.transformer import Transformer, from_tensors, tensor_shapes
from flux2_relay.stages.weights import open_tensors

FILES = ((4, 1, 6.0), (3, 2, None))
"""Rank, seed, alpha of two files."""


@pytest.fixture
def files(dev: Path, tmp_path: Path) -> list[Path]:
    """One of every linear, one of some, the outer ones included in both."""
    of = spec.from_checkpoint(dev).transformer
    wanted = (lambda path: True, lambda path: path.endswith(("to_q", "linear_in", "x_embedder", "norm_out.linear")))
    return [
        adapters.write(tmp_path / f"{seed}.safetensors", adapters.factors(of, rank, seed, some), alpha)
        for (rank, seed, alpha), some in zip(FILES, wanted, strict=True)
    ]


def merged(dev: Path, files: Sequence[Path], strengths: Sequence[float], tmp_path: Path) -> Transformer:
    """W + sum of strength * alpha / rank B A, formed in float64 from the files' own bytes."""
    of = spec.from_checkpoint(dev).transformer
    tensors = names.open_transformer(dev / "transformer")
    weights = {name: np.array(value).astype(np.float64) for name, value in tensors.read_all(tensor_shapes(of)).items()}
    for file, strength in zip(files, strengths, strict=True):
        values = mx.load(str(file))
        assert isinstance(values, dict)
        arrays = {name.removeprefix("transformer."): np.array(v).astype(np.float64) for name, v in values.items()}
        for path in {name.rsplit(".lora_", 1)[0] for name in arrays if ".lora_" in name}:
            a, b = arrays[f"{path}.lora_A.weight"], arrays[f"{path}.lora_B.weight"]
            alpha = float(arrays.get(f"{path}.alpha", np.array(len(a))))
            weights[f"{path}.weight"] += strength * alpha / len(a) * b @ a
    path = tmp_path / "merged.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(value.astype(np.float32)) for name, value in weights.items()})
    return from_tensors(open_tensors(path), of, bits=32)


def mixed(dev: Path, files: Sequence[Path], strengths: Sequence[float]) -> Transformer:
    model = ours.load(dev)
    model.adapters = mixing.mix(mixing.read_all(files, model.spec), strengths)
    return model


def velocity(model: Transformer) -> np.ndarray:
    return ours.velocity(model, cases.draw(model.spec.context_width, seed=4, guidance=(3.0, 1.0)))


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, -1.5), (0.0, 1.0), (2.0, 0.0)])
def test_the_sum_is_that_of_merged_weights(
    dev: Path, files: list[Path], strengths: tuple[float, ...], tmp_path: Path
) -> None:
    expected = velocity(merged(dev, files, strengths, tmp_path))
    assert_near(velocity(mixed(dev, files, strengths)), expected, 1e-5)
    assert relative_error(velocity(ours.load(dev)), expected) > 1e-2, "the adapters do too little to show a mistake"


def test_at_strength_0_nothing_is_attached(dev: Path, files: list[Path]) -> None:
    model = mixed(dev, files, (0.0, 0.0))
    assert model.adapters == {}
    np.testing.assert_array_equal(velocity(model), velocity(ours.load(dev)))


def test_an_adapter_at_0_leaves_the_other_alone(dev: Path, files: list[Path]) -> None:
    np.testing.assert_array_equal(velocity(mixed(dev, files, (0.0, 0.7))), velocity(mixed(dev, files[1:], (0.7,))))


def test_strength_multiplies_alpha_over_rank(dev: Path, files: list[Path]) -> None:
    model = mixed(dev, files, (0.5, 3.0))
    values = mx.load(str(files[0]))
    assert isinstance(values, dict)
    path = "transformer_blocks.1.attn.to_k"  # in the first file alone
    a, b, scale, _ = model.adapters[path]
    assert mx.array_equal(a, values[f"transformer.{path}.lora_A.weight"])
    assert mx.array_equal(scale * b, values[f"transformer.{path}.lora_B.weight"] * (6.0 / 4 * 0.5))
    a, b, *_ = model.adapters["transformer_blocks.1.attn.to_q"]
    assert (a.shape[0], b.shape[1]) == (7, 7)


def test_a_folder_stands_for_its_adapter(tmp_path: Path) -> None:
    assert mixing.locate(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"without adapter\.safetensors"):
        mixing.locate(tmp_path)
    (tmp_path / "adapter.safetensors").touch()
    assert mixing.locate(tmp_path) == tmp_path / "adapter.safetensors"


def test_every_file_that_does_not_fit_is_named(dev: Path, files: list[Path], tmp_path: Path) -> None:
    of = spec.from_checkpoint(dev).transformer
    with pytest.raises(InputError) as refused:
        mixing.read_all([files[0], tmp_path / "gone.safetensors", dev / "vae/diffusion_pytorch_model.safetensors"], of)
    assert "gone.safetensors: no such file" in str(refused.value)
    assert "diffusion_pytorch_model.safetensors is no LoRA" in str(refused.value)
