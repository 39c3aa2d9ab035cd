"""Merged weights: the numbers, the files they stand in, and how little of a model is in memory at a time."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import layouts, model, namings

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages import names
from flux2_relay.stages.shards import Shards
from flux2_relay.stages.spec import TransformerSpec, read_transformer_spec
from flux2_relay.stages.train import merge
from flux2_relay.stages.train.mixing import Changes
from flux2_relay.stages.train.transformer import tensor_shapes
from flux2_relay.stages.train.updates import Factors
from flux2_relay.stages.weights import open_tensors


def changes(spec: TransformerSpec) -> dict[str, Changes]:
    """Of every other linear, outer ones included."""
    of = list(namings.pairs(spec, rank=3).items())[::2]
    return {path: [(Factors(a, 0.1 * b, 0.35), 2.0)] for path, (a, b) in of}


def merged(place: Path, folder: Path, dtype: str = "F32", most_bytes: int = 10**9) -> layouts.Values:
    """What stands in the folder afterwards."""
    spec = read_transformer_spec(place)
    folder.mkdir()
    shards = merge.plan(spec, dtype, most_bytes)  # type: ignore[arg-type]
    told: list[int] = []
    merge.merge(merge.open_dense(place, spec), changes(spec), shards, folder, told.append)
    assert sum(told) == shards.total == sum(info.end - info.start for info in open_tensors(folder).info.values())
    tensors = open_tensors(folder)
    return tensors.read_all(tensors.info)


def by_hand(base: layouts.Values, spec: TransformerSpec) -> dict[str, np.ndarray]:
    """In float64."""
    values = {name: np.array(value.astype(mx.float32), np.float64) for name, value in base.items()}
    for path, ((update, strength),) in changes(spec).items():
        a, b = (np.array(x, np.float64) for x in update.arrays())
        values[f"{path}.weight"] += strength * 0.35 * b @ a
    return values


def assert_is(found: layouts.Values, expected: dict[str, np.ndarray], dtype: mx.Dtype, limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype
        np.testing.assert_allclose(
            np.array(found[name].astype(mx.float32)), value, rtol=limit, atol=3e-7 * np.abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize("stretch", [700, 1 << 13, 1 << 25])
def test_every_stretch_adds_its_own_rows(checkpoint: Path, tmp_path: Path, monkeypatch, stretch: int) -> None:
    monkeypatch.setattr(merge, "STRETCH_BYTES", stretch)
    place = checkpoint / "transformer"
    expected = by_hand(layouts.load(place), read_transformer_spec(place))
    assert_is(merged(place, tmp_path / "out"), expected, mx.float32, 1e-6)


@pytest.mark.parametrize("kept", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("form", ["diffusers", "BFL"])
def test_any_base_in_any_type(dev: Path, tmp_path: Path, kept: mx.Dtype, form: str) -> None:
    values = {name: value.astype(kept) for name, value in layouts.load(dev / "transformer").items()}
    if form == "BFL":
        place = layouts.save(tmp_path / "f.safetensors", layouts.bfl_transformer(values), "model.diffusion_model.")
    else:
        place = tmp_path / "transformer"
        layouts.save(place / "x.safetensors", values)
    expected = by_hand(values, read_transformer_spec(dev / "transformer"))
    assert_is(merged(place, tmp_path / "out"), expected, mx.float32, 1e-6)
    assert_is(merged(place, tmp_path / "half", "BF16"), expected, mx.bfloat16, 2**-8)


def test_a_base_of_8_bit_floats_with_scales(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "STRETCH_BYTES", 1 << 13)
    made, dense, eights = {}, {}, {}
    for name, value in layouts.load(dev / "transformer").items():
        made[name] = dense[name] = value
        if value.ndim == 2:
            made[name], made[f"{name}_scale"] = mx.to_fp8(value / 0.5), mx.array(0.5)
            dense[name] = mx.from_fp8(made[name], dtype=mx.float32) * 0.5
            eights[name] = "F8_E4M3"
    place = layouts.retype(layouts.save(tmp_path / "f.safetensors", made), eights)
    expected = by_hand(dense, read_transformer_spec(place))
    assert_is(merged(place, tmp_path / "out"), expected, mx.float32, 1e-6)


def test_what_has_no_adapter_keeps_its_bits(dev: Path, tmp_path: Path) -> None:
    base = {name: value.astype(mx.bfloat16) for name, value in layouts.load(dev / "transformer").items()}
    spec = read_transformer_spec(dev / "transformer")
    layouts.save(tmp_path / "base" / "x.safetensors", base)
    found = merged(tmp_path / "base", tmp_path / "out", "BF16")
    same = {name for name in base if mx.array_equal(found[name], base[name])}
    assert same == base.keys() - {f"{path}.weight" for path in changes(spec)}


def test_shards_are_as_large_as_they_may_be_and_have_an_index(dev: Path, tmp_path: Path) -> None:
    whole = merged(dev / "transformer", tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["diffusion_pytorch_model.safetensors"]
    largest = max(value.nbytes for value in whole.values())
    parts = merged(dev / "transformer", tmp_path / "parts", most_bytes=largest + 100)
    assert all(mx.array_equal(parts[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "parts/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    files = set(index["weight_map"].values())
    assert index["weight_map"].keys() == whole.keys()
    assert files == {path.name for path in (tmp_path / "parts").glob("*.safetensors")}
    assert f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors" in files
    assert all((tmp_path / "parts" / name).stat().st_size < largest + 100 + 20_000 for name in files)
    one_each = Shards(shapes=tensor_shapes(read_transformer_spec(dev / "transformer")), dtype="F32", most_bytes=1)
    assert len(one_each.files()) == len(whole), "what is larger than a file may be has one of its own"


def test_the_memory_is_that_of_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of a mebibyte, in stretches of a sixteenth of it: not even one matrix is whole in memory."""
    spec = TransformerSpec(
        double_blocks=1, single_blocks=1, heads=1, head_dim=192, context_width=64, guidance=False, rope_axes=(48,) * 4
    )
    layouts.save(tmp_path / "base.safetensors", model.random(tensor_shapes(spec), 0))
    largest = max(4 * int(np.prod(shape)) for shape in tensor_shapes(spec).values())
    monkeypatch.setattr(merge, "STRETCH_BYTES", largest // 16)
    given = changes(spec)
    mx.eval([update.arrays() for ((update, _),) in given.values()])
    shards, base = merge.plan(spec, "BF16"), names.open_transformer(tmp_path / "base.safetensors")
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    (tmp_path / "out").mkdir()
    merge.merge(base, given, shards, tmp_path / "out", lambda written: None)
    assert mx.get_peak_memory() - before < 4 * largest // 16


def test_bytes_that_do_not_come_or_have_no_room_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(shapes={"x.weight": (2, 3)}, dtype="F32")
    with pytest.raises(RelayError, match=r"20 bytes of x\.weight came, 24 were expected"):
        shards.write(tmp_path, lambda name: [b"0" * 20])
    (tmp_path / "full").mkdir()

    def full(name: str) -> list[bytes]:
        raise OSError(28, "No space left on device")

    with pytest.raises(RelayError, match="is the disk full"):
        shards.write(tmp_path / "full", full)


def test_a_packed_or_another_base_is_refused(dev: Path, klein: Path, tmp_path: Path) -> None:
    values = layouts.load(dev / "transformer")
    spec = read_transformer_spec(dev / "transformer")
    layouts.save(tmp_path / "a/x.safetensors", {**values, "proj_out.scales": mx.zeros((128, 1))})
    with pytest.raises(InputError, match="quantized by MLX"):
        merge.open_dense(tmp_path / "a", spec)
    with pytest.raises(InputError, match="guidance_embedder"):
        merge.open_dense(klein / "transformer", spec)
