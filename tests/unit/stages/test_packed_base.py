"""A transformer that MLX has packed before: the numbers of its own weights, told by content, refused where broken."""

# pyright: reportArgumentType=false

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, layouts, ours
from tiny.cases import Case
from tiny.compare import assert_near
from tiny.project import Project

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import quantize, spec
from flux2_relay.stages.train import layout
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.options import MemoryOptions
from flux2_relay.stages.train.residence import Streamed
from flux2_relay.stages.train.step_work import Load
from flux2_relay.stages.train.transformer import Transformer, load_transformer, stock_of

MODES = {
    "affine4": {"bits": 4, "group_size": 64},
    "affine6": {"bits": 6, "group_size": 32, "mode": "affine"},
    "affine8": {"bits": 8, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}


def packed(dev: Path, folder: Path, settings: dict, choose: Callable = lambda path: True) -> Path:
    """A model folder with a packed transformer, as an MLX conversion leaves it."""
    layouts.pack_encoder(dev / "transformer", folder / "transformer", settings, choose)
    return folder


def dense(folder: Path, target: Path) -> Path:
    layouts.unpack_encoder(folder / "transformer", target / "transformer")
    return target


def load(folder: Path, bits: int = 32, **how) -> Transformer:
    return load_transformer(folder, spec.read_transformer_spec(folder / "transformer"), bits, mx.float32, **how)


def case_of(model: Transformer) -> Case:
    return cases.draw(model.spec.context_width, guidance=[2.0], seed=1, sigma=(0.4,))


def weight(model: Transformer, place: int, name: str) -> quantize.Weight:
    return model.residence.weights(place)[name]


def parts(model: Transformer, name: str) -> tuple[mx.array, ...]:
    found = weight(model, 0, name)
    return (found,) if isinstance(found, mx.array) else found


@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradients_are_those_of_the_same_weights_made_dense(dev: Path, tmp_path: Path, mode: str) -> None:
    folder = packed(dev, tmp_path / "packed", MODES[mode])
    found, expected = load(folder), load(dense(folder, tmp_path / "dense"))
    assert isinstance(weight(found, 0, "attn.to_q"), tuple)
    assert isinstance(found.outer["x_embedder"], tuple)
    case = case_of(found)
    assert_near(ours.velocity(found, case), ours.velocity(expected, case), 3e-6, mode)
    for model in (found, expected):
        ours.attach(model, LoraOptions(rank=2))
    (loss, gradients), (same, others) = ours.gradients(found, case), ours.gradients(expected, case)
    assert loss == pytest.approx(same, rel=1e-6)
    for name, value in gradients.items():
        assert_near(value, others[name], 2e-5, name)
    assert not np.allclose(ours.velocity(load(dev), case), ours.velocity(expected, case), rtol=1e-3)


def some(path: str) -> layouts.Settings:
    """As mixed conversions are: one kind of matrix at more bits, one left as it was."""
    if path.endswith("to_out"):
        return {"bits": 8, "group_size": 32, "mode": "affine"}
    return not path.endswith("to_k") and not path.startswith("x_embedder")


def test_settings_of_single_modules_hold(dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["affine4"], some)
    found, expected = load(folder), load(dense(folder, tmp_path / "dense"))
    assert len(weight(found, 3, "attn.to_out")) == 3
    assert isinstance(weight(found, 0, "attn.to_k"), mx.array)
    assert_near(ours.velocity(found, case_of(found)), ours.velocity(expected, case_of(found)), 3e-6)
    stored = stock_of(folder / "transformer", found.spec)
    assert stored["single_transformer_blocks.1.attn.to_out"].packing.bits == 8
    assert stored["transformer_blocks.0.attn.to_q"].packing.bits == 4
    assert "transformer_blocks.0.attn.to_k" not in stored


def test_fewer_bits_pack_again_and_more_do_not(dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["affine6"], some)
    whole = dense(folder, tmp_path / "dense")
    less, same, more = (load(folder, bits) for bits in (4, 6, 8))
    for place, name in ((0, "attn.to_q"), (3, "attn.to_out")):
        matrix = weight(load(whole), place, name)
        assert isinstance(matrix, mx.array)
        again = quantize.pack(matrix, 4)
        assert all(mx.array_equal(a, b) for a, b in zip(weight(less, place, name), again, strict=True))
    pairs = zip(weight(same, 0, "attn.to_q"), weight(more, 0, "attn.to_q"), strict=True)
    assert all(mx.array_equal(a, b) for a, b in pairs)
    assert isinstance(weight(same, 0, "attn.to_k"), tuple)  # what the file left dense is packed as asked for


def test_names_of_bfl_are_cut_with_their_scales(dev: Path, tmp_path: Path) -> None:
    """q, k and v share a matrix there; its rows are cut, and those of scales and biases with them."""
    folder = packed(dev, tmp_path / "packed", MODES["affine8"])
    values = layouts.load(folder / "transformer")
    parts: dict[str, dict[str, mx.array]] = {"weight": {}, "scales": {}, "biases": {}}
    for name, value in values.items():
        path, _, part = name.rpartition(".")
        parts[part][f"{path}.weight"] = value
    renamed = {
        name.removesuffix("weight") + part if part != "weight" else name: value
        for part, of_part in parts.items()
        for name, value in layouts.bfl_transformer(of_part).items()
    }
    target = tmp_path / "bfl"
    layouts.save(target / "transformer/model.safetensors", renamed)
    (target / "transformer/config.json").write_text((dev / "transformer/config.json").read_text())
    found, expected = load(target), load(folder)
    assert np.array_equal(ours.velocity(found, case_of(found)), ours.velocity(expected, case_of(found)))


def test_streamed_is_resident_bit_for_bit(dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["affine4"], some)
    resident, streamed = load(folder, 8), load(folder, 8, residence=partial(Streamed, resident=1, ahead=2))
    for model in (resident, streamed):
        ours.attach(model, LoraOptions(rank=2))
    case = case_of(resident)
    (loss, found), (same, expected) = ours.gradients(streamed, case), ours.gradients(resident, case)
    streamed.residence.close()
    assert loss == same
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_only_what_is_packed_again_is_kept_on_disk(dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["nvfp4"])
    load(folder, 8, copy=tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    mixed = packed(dev, tmp_path / "mixed", MODES["nvfp4"], lambda path: not path.endswith("to_k"))
    first, second = (load(mixed, 8, copy=tmp_path / "copy") for _ in "ab")
    assert len(list((tmp_path / "copy").iterdir())) == 2  # the double blocks; single ones have no to_k
    for name in first.residence.weights(0):
        pairs = zip(parts(first, name), parts(second, name), strict=True)
        assert all(mx.array_equal(a, b) for a, b in pairs), name


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_the_plan_counts_what_is_held(dev: Path, tmp_path: Path, bits: int) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["affine8"], some)
    found = spec.read_transformer_spec(folder / "transformer")
    sizes = {"batch": 1, "rows": 64, "adapter_bytes": 0, "adapter_copies": 4, "item_bytes": 4}
    carried = Load(**sizes, fused_attention=False, stored=stock_of(folder / "transformer", found))
    plan = layout.predict(found, carried, bits, found.blocks)
    model = load(folder, bits)
    held = [model.outer, *map(model.residence.weights, range(found.blocks))]
    weights = [weight if isinstance(weight, tuple) else (weight,) for some in held for weight in some.values()]
    assert plan.parts["weights"] == pytest.approx(sum(part.nbytes for parts in weights for part in parts), rel=0.01)
    assert plan.in_words().startswith("4 bit" if bits == 4 else "as stored (affine 8 bit, groups of 64)")
    assert plan.parts["dense copies"] > 0
    del model
    auto = layout.choose(found, carried, MemoryOptions(), 10**12)
    assert auto.stored == "as stored (affine 8 bit, groups of 64)"


def test_a_config_that_says_otherwise_is_refused(dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["affine4"])
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    config["quantization"]["bits"] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"affine 8 bit.* by the config, affine 4 bit"):
        load(folder)


def broken(folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> None:
    values = layouts.load(folder / "transformer")
    mx.eval(values)
    layouts.save(folder / "transformer/model.safetensors", change(values))


def test_scales_that_are_not_finite_are_refused(dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["affine4"])
    name = "transformer_blocks.1.ff.linear_in.scales"
    broken(folder, lambda values: {**values, name: values[name] * mx.array(float("nan"))})
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.ff\.linear_in has scales that are not finite"):
        load(folder)


def test_parts_that_are_missing_or_too_many_are_named(dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed", MODES["affine4"])
    lost = "transformer_blocks.1.attn.to_q.biases"
    broken(folder, lambda values: {name: value for name, value in values.items() if name != lost})
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.attn\.to_q: its biases are missing"):
        load(folder)
    broken(folder, lambda values: {**values, lost: values[lost.replace("biases", "scales")], "more.scales": mx.ones(1)})
    with pytest.raises(InputError, match=r"more\.scales in model\.safetensors is not part of this model"):
        load(folder)


def test_a_packed_model_trains_and_plans(encoded: Callable[..., Project], dev: Path, tmp_path: Path) -> None:
    folder = packed(dev, tmp_path / "packed/dev", MODES["affine8"])
    for part in ("text_encoder", "tokenizer", "vae", "model_index.json"):
        (folder / part).symlink_to(dev / part)
    project = encoded(model={"path": str(folder)}, memory={"bits": "auto"}, previews={"every": 0})
    for command in ("plan", "train"):
        outcome = project.relay(command)
        assert outcome.status == 0, outcome.said
        assert "as stored (affine 8 bit, groups of 64)" in outcome.said
