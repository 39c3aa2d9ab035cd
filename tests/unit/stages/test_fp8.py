"""Single files whose weights are 8-bit floats: the numbers that they stand for, bit for bit, in every part."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, layouts, ours
from tiny.project import Project, relay

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import fp8, identity, names, spec, vae
from flux2_relay.stages.encode import encoder_weights
from flux2_relay.stages.encode.encoder_weights import embedding_rows, encoder_identity, open_encoder
from flux2_relay.stages.encode.layers import resident_layers
from flux2_relay.stages.encode.text import load_text_encoder
from flux2_relay.stages.sizes import TextSpec
from flux2_relay.stages.train.transformer import load_transformer
from flux2_relay.stages.weights import open_tensors

Scale = Callable[[mx.array], mx.array]
SCALES: dict[str, Scale] = {
    "a number": lambda weight: mx.abs(weight).max() / 448,
    "one of one": lambda weight: mx.abs(weight).max(keepdims=True).reshape(1) / 448,
    "rows": lambda weight: mx.abs(weight).max(axis=1) / 448,
    "a column": lambda weight: mx.abs(weight).max(axis=1, keepdims=True) / 448,
}


def write(
    file: Path,
    values: layouts.Values,
    scale: Scale | None,
    *,
    old: bool = False,
    prefix: str = "",
    embedding: bool = False,
) -> Path:
    """A file with its matrices in fp8, and the same in `dense/` with what they stand for, in float32.

    As ComfyUI writes it now, or as it did before (`old`); without scales all vectors are cast, too.
    """
    made, dense, types = {}, {}, {}
    for name, value in values.items():
        if scale is None or (value.ndim == 2 and (embedding or "embed" not in name)):
            factor = mx.array(1.0) if scale is None else scale(value)
            wide = factor.reshape(-1, 1) if factor.size > 1 else factor.reshape(())
            made[name] = mx.to_fp8(value / wide)
            dense[name] = mx.from_fp8(made[name], dtype=mx.float32) * wide
            types[prefix + name] = "F8_E4M3"
            if scale is not None:
                path = name.removesuffix(".weight")
                extra = mx.zeros(3, mx.uint8), mx.array(0.5)
                made |= {f"{path}.scale_weight": factor, f"{path}.scale_input": extra[1]} if old else {
                    f"{path}.weight_scale": factor, f"{path}.comfy_quant": extra[0], f"{path}.input_scale": extra[1]
                }  # fmt: skip
        else:
            made[name] = dense[name] = value
    if old:
        made["scaled_fp8"], types[prefix + "scaled_fp8"] = mx.zeros(2, mx.uint8), "F8_E4M3"
    layouts.save(file.with_name("dense") / file.name, dense, prefix)
    return layouts.retype(layouts.save(file, made, prefix), types)


def dense_of(file: Path) -> Path:
    return file.with_name("dense") / file.name


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("scale", [None, *SCALES])
def test_a_text_encoder_in_fp8(checkpoint: Path, tmp_path: Path, scale: str | None, old: bool) -> None:
    values = layouts.load(checkpoint / "text_encoder")
    file = write(tmp_path / "a.safetensors", values, SCALES[scale] if scale else None, old=old and bool(scale))
    text = spec.read_text_spec(checkpoint / "text_encoder")
    captions = ["a red fox", ""]
    expected = load_text_encoder(checkpoint, text, 32, folder=dense_of(file)).encode(captions)
    for streamed in (False, True):
        encoder = load_text_encoder(checkpoint, text, 32, folder=file, streamed=streamed)
        assert mx.array_equal(encoder.encode(captions), expected)
    plain = load_text_encoder(checkpoint, text, 32).encode(captions)
    assert 1e-4 < mx.abs(plain - expected).max() / mx.abs(plain).max() < 0.5


@pytest.mark.parametrize("rows", ["a number", "rows"])
def test_a_scaled_embedding_is_read_row_by_row(dev: Path, tmp_path: Path, rows: str) -> None:
    file = write(tmp_path / "a.safetensors", layouts.load(dev / "text_encoder"), SCALES[rows], embedding=True)
    tensors = open_encoder(file, spec.read_text_spec(dev / "text_encoder"))
    assert tensors.info["embed_tokens.weight"].scale
    ids = np.array([[5, 7], [7, 419]])
    table = tensors.read("embed_tokens.weight")
    assert mx.array_equal(embedding_rows(tensors, ids, mx.float32), table[mx.array(ids.astype(np.uint32))])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scale", [None, "a number", "rows"])
def test_a_transformer_in_fp8(dev: Path, tmp_path: Path, scale: str | None, prefix: str) -> None:
    """As BFL names it: q, k and v share a matrix, and its scale."""
    values = layouts.bfl_transformer(layouts.load(dev / "transformer"))
    file = write(tmp_path / "a.safetensors", values, SCALES[scale] if scale else None, prefix=prefix)
    found = spec.read_transformer_spec(file)
    assert found == spec.read_transformer_spec(dev / "transformer")
    case = cases.draw(found.context_width, guidance=[2.0], seed=1, sigma=(0.4,))
    velocities = [ours.velocity(load_transformer(place, found, 32), case) for place in (file, dense_of(file))]
    assert np.array_equal(velocities[0], velocities[1])


def test_a_vae_in_fp8(dev: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", layouts.bfl_vae(layouts.load(dev / "vae")), None)
    shutil.copy(dev / "vae/config.json", tmp_path)
    images = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32))
    shutil.copy(dev / "vae/config.json", tmp_path / "dense")
    assert mx.array_equal(
        vae.load_encoder(dev, file).encode(images), vae.load_encoder(dev, dense_of(file)).encode(images)
    )


def test_the_identity_covers_scales_and_nothing_that_is_not_needed(dev: Path, tmp_path: Path) -> None:
    values, text = layouts.load(dev / "text_encoder"), spec.read_text_spec(dev / "text_encoder")

    def identity_of(name: str, scale: Scale, old: bool = False) -> str:
        return encoder_identity(open_encoder(write(tmp_path / name, values, scale, old=old), text), text)

    scale = SCALES["a number"]
    first = identity_of("a.safetensors", scale)
    assert identity_of("b.safetensors", scale, old=True) == first
    tensors = open_encoder(tmp_path / "a.safetensors", text)
    of = tensors.info["layers.0.mlp.up_proj.weight"].scale
    assert of is not None
    data = bytearray(of.file.read_bytes())
    data[of.start] ^= 1
    (tmp_path / "c.safetensors").write_bytes(data)
    assert encoder_identity(open_encoder(tmp_path / "c.safetensors", text), text) != first


def test_a_hash_to_come_counts_the_scales(dev: Path, tmp_path: Path) -> None:
    text = spec.read_text_spec(dev / "text_encoder")
    file = write(tmp_path / "a.safetensors", layouts.load(dev / "text_encoder"), SCALES["a number"])
    tensors = open_encoder(file, text)
    assert fp8.is_fp8(tensors)
    assert not identity.is_remembered(tensors)
    identity.remember(tensors, lambda size: None)
    assert identity.is_remembered(tensors)


@pytest.mark.parametrize("scale", [None, "rows"])
def test_models_says_that_files_are_fp8(dev: Path, tmp_path: Path, scale: str | None) -> None:
    folder = Path(shutil.copytree(dev, tmp_path / "model"))
    told = {row["part"]: row["layout"] for row in json.loads(relay("models", "--path", folder, "--json").said)["parts"]}
    assert not any("fp8" in layout for layout in told.values())
    for part in ("text_encoder", "transformer", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        values = {name: value for name, value in layouts.load(folder / part).items() if "vision" not in name}
        shutil.copy(write(tmp_path / f"{part}.safetensors", values, SCALES[scale] if scale else None), file)
    told = {row["part"]: row for row in json.loads(relay("models", "--path", folder, "--json").said)["parts"]}
    assert not any(row["fault"] for row in told.values()), told
    assert told["text_encoder"]["layout"] == "plain, fp8"
    assert told["transformer"]["layout"] == "diffusers, fp8"
    assert told["vae"]["layout"] == "diffusers, fp8"


def test_stage_one_says_what_fp8_costs(dev: Path, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev / "text_encoder", tmp_path / "encoder")
    write(tmp_path / "a.safetensors", layouts.load(folder), SCALES["a number"]).replace(folder / "model.safetensors")
    project = Project(tmp_path / "p", dev, pictures).write({"model": {"path": str(dev), "text_encoder": str(folder)}})
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    assert "holds 8-bit floats (fp8)" in outcome.said
    assert "encoded 7 captions and 5 images" in outcome.said


UP = "language_model.model.layers.0.mlp.up_proj"
BROKEN: dict[str, tuple[dict[str, mx.array], dict[str, str], str]] = {
    "nvfp4": ({f"{UP}.weight": mx.zeros((96, 32), mx.uint8)}, {}, "up_proj.weight of type U8 has a scale beside it"),
    "int8": ({f"{UP}.weight": mx.zeros((96, 64), mx.int8)}, {}, "up_proj.weight of type I8 has a scale beside it"),
    "mxfp8": ({f"{UP}.weight_scale": mx.zeros((96, 2), mx.uint8)}, {}, "up_proj.weight is scaled in blocks (U8 of "),
    "blocks": ({f"{UP}.weight_scale": mx.ones((96, 2))}, {}, "up_proj.weight is scaled in blocks (F32 of shape [96, 2"),
    "e5m2": ({}, {f"{UP}.weight": "F8_E5M2"}, "up_proj.weight has type F8_E5M2"),
    "alone": ({f"{UP}.other.weight_scale": mx.array(1.0)}, {}, "up_proj.other.weight_scale has no weight beside it"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_other_ways_of_packing_say_what_to_take_instead(dev: Path, tmp_path: Path, kind: str) -> None:
    changed, types, said = BROKEN[kind]
    values = layouts.load(dev / "text_encoder")
    file = write(tmp_path / "a.safetensors", values, SCALES["a number"])
    whole = {name: mx.array(value) for name, value in layouts.load(file).items()}
    kept = {name: "F8_E4M3" for name in whole if f"{name}_scale" in whole and name not in changed}
    layouts.retype(layouts.save(tmp_path / "b.safetensors", whole | changed), kept | types)
    with pytest.raises(InputError, match="download the folder text_encoder/") as refused:
        names.text_encoder(open_tensors(tmp_path / "b.safetensors"))
    assert said in str(refused.value)


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("kind", ["F32", "BF16", "fp8", "fp8 scaled"])
def test_a_layer_is_read_a_matrix_at_a_time_in_the_memory_foretold(tmp_path: Path, kind: str, bits: int) -> None:
    """What a matrix is made from (the file's bytes, float32 between) never stands beside the whole layer."""
    text = TextSpec(
        family="mistral", layers=2, hidden=256, mlp_width=2048, heads=4, kv_heads=2, head_dim=64, vocabulary=9,
        rope_theta=1e6, eps=1e-5, taps=(1,), length=48,
    )  # fmt: skip
    made = {"F32": mx.float32, "BF16": mx.bfloat16}.get(kind, mx.float32)
    values = {name: mx.full(shape, 0.01, made) for name, shape in encoder_weights.tensor_shapes(text).items()}
    file = tmp_path / "a.safetensors"
    if kind in ("F32", "BF16"):
        layouts.save(file, values)
    else:
        write(file, values, SCALES["a number"] if "scaled" in kind else None)
    tensors = open_encoder(file, text)
    gc.collect()  # what other tests left must not go while this one measures
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    (layer,) = resident_layers(tensors, text, bits)
    peak, held = mx.get_peak_memory() - before, mx.get_active_memory() - before
    foretold = encoder_weights.reading_bytes(tensors, text, bits)
    assert held == pytest.approx(encoder_weights.layer_bytes(text, bits), rel=0.01)
    assert held <= peak <= 1.01 * (held + foretold)
    assert foretold <= 1.2 * (peak - held) + 4 * 256 * 2048, "a copy too many at most"
    del layer
