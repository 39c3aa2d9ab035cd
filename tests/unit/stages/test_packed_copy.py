"""Quantized blocks kept on disk: the same weights, made once, made again where they no longer fit."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from flux2_relay.stages import quantize, spec
from flux2_relay.stages.train.transformer import Transformer, load_transformer


def load(folder: Path, copy: Path | None, bits: int = 8) -> Transformer:
    return load_transformer(folder, spec.read_transformer_spec(folder / "transformer"), bits, copy=copy)


def same(one: Transformer, other: Transformer) -> bool:
    for place in range(one.spec.blocks):
        first, second = one.residence.weights(place), other.residence.weights(place)
        assert first.keys() == second.keys()
        pairs = [(a, b) for name in first for a, b in zip(parts(first[name]), parts(second[name]), strict=True)]
        if not all(mx.array_equal(a, b) for a, b in pairs):
            return False
    return True


def parts(weight: quantize.Weight) -> tuple[mx.array, ...]:
    return weight if isinstance(weight, tuple) else (weight,)


def test_the_second_load_quantizes_no_block(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, first = load(dev, None), load(dev, tmp_path / "copy")
    files = sorted((tmp_path / "copy").iterdir())
    assert len(files) == plain.spec.blocks
    packed, pack = [], quantize.pack
    monkeypatch.setattr(quantize, "pack", lambda weight, bits: packed.append(weight.shape) or pack(weight, bits))
    second = load(dev, tmp_path / "copy")
    assert len(packed) == len(plain.outer)  # what stands outside the blocks is small, and not kept
    assert same(plain, first)
    assert same(plain, second)
    assert sorted((tmp_path / "copy").iterdir()) == files


def test_other_bits_and_other_weights_make_other_files(dev: Path, tmp_path: Path) -> None:
    load(dev, tmp_path / "copy")
    load(dev, tmp_path / "copy", bits=4)
    changed = shutil.copytree(dev, tmp_path / "changed")
    (file,) = (changed / "transformer").glob("*.safetensors")
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    name = "transformer_blocks.0.attn.to_q.weight"
    mx.eval(weights)
    mx.save_safetensors(str(file), {**weights, name: weights[name] + 1})
    load(changed, tmp_path / "copy")
    blocks = spec.read_transformer_spec(dev / "transformer").blocks
    assert len(list((tmp_path / "copy").iterdir())) == 2 * blocks + 1


def test_a_damaged_copy_is_made_again(dev: Path, tmp_path: Path) -> None:
    load(dev, tmp_path / "copy")
    damaged = sorted((tmp_path / "copy").iterdir())[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])
    assert same(load(dev, None), load(dev, tmp_path / "copy"))
    assert damaged.read_bytes() == whole


def test_unquantized_weights_are_not_copied(dev: Path, tmp_path: Path) -> None:
    load(dev, tmp_path / "copy", bits=16)
    assert not (tmp_path / "copy").exists()
