"""Other tools' layouts of the same weights: the same numbers bit for bit, the same identity, the same spec."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, layouts, ours

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import catalogue, folders, identity, infer, names, spec, vae
from flux2_relay.stages.encode import encoder_weights
from flux2_relay.stages.encode.encoder_weights import encoder_identity, open_encoder
from flux2_relay.stages.encode.text import load_text_encoder
from flux2_relay.stages.train.transformer import load_transformer, tensor_shapes
from flux2_relay.stages.weights import TensorInfo, Tensors, open_tensors

PREFIXES = ["", "model.diffusion_model."]


def bfl(model: Path, file: Path, prefix: str = "", norm: str = "scale") -> Path:
    """The transformer of a model as a single file."""
    return layouts.save(file, layouts.bfl_transformer(layouts.load(model / "transformer"), norm), prefix)


def whole_identity(place: Path) -> str:
    tensors = names.open_transformer(place)
    return identity.weights_identity(tensors, tensors.info, {})


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_a_single_file_is_the_transformer_of_the_folder(
    checkpoint: Path, tmp_path: Path, prefix: str, norm: str
) -> None:
    file = bfl(checkpoint, tmp_path / "any-name.safetensors", prefix, norm)
    found = spec.read_transformer_spec(file)
    assert found == spec.read_transformer_spec(checkpoint / "transformer")
    actual, expected = names.open_transformer(file), names.open_transformer(checkpoint / "transformer")
    assert set(actual.info) == set(expected.info)
    for name in expected.info:
        assert mx.array_equal(actual.read(name), expected.read(name)), name
        assert actual.info[name].shape == expected.info[name].shape
    assert whole_identity(file) == whole_identity(checkpoint / "transformer")
    case = cases.draw(found.context_width, guidance=[2.0] if found.guidance else None, seed=1, sigma=(0.4,))
    assert np.array_equal(
        ours.velocity(load_transformer(file, found, 32), case), ours.velocity(ours.load(checkpoint), case)
    )


def test_swapped_or_misplaced_rows_show_in_the_identity(dev: Path, tmp_path: Path) -> None:
    """The identity of a fused or turned tensor is that of its rows, in their order."""
    values = layouts.bfl_transformer(layouts.load(dev / "transformer"))
    right = whole_identity(layouts.save(tmp_path / "a.safetensors", values))
    for name in ("final_layer.adaLN_modulation.1.weight", "double_blocks.1.txt_attn.qkv.weight"):
        turned = mx.concatenate([values[name][1:], values[name][:1]])
        file = layouts.save(tmp_path / f"{name}.safetensors", {**values, name: turned})
        assert whole_identity(file) != right, name


def test_digests_of_parts_are_remembered_apart(dev: Path, tmp_path: Path) -> None:
    tensors = names.open_transformer(bfl(dev, tmp_path / "a.safetensors"))
    parts = [tensors.info[f"transformer_blocks.0.attn.{name}.weight"] for name in ("to_q", "to_k", "to_v")]
    first, again = identity.tensor_digests(parts), identity.tensor_digests(reversed(parts))
    assert first == again
    assert len(set(first.values())) == 3


def test_a_block_is_read_without_the_others(dev: Path, tmp_path: Path) -> None:
    """Only the file's tensors of that block are evaluated: all others may be damaged."""
    file = bfl(dev, tmp_path / "a.safetensors")
    tensors = names.open_transformer(file)
    wanted = [name for name in tensors.info if name.startswith("transformer_blocks.1.")]
    before = {name: np.array(value) for name, value in tensors.read_all(wanted).items()}
    kept = {(info.start, info.end) for name in wanted for info in [tensors.info[name]]}
    data = bytearray(file.read_bytes())
    for info in tensors.info.values():
        if not any(start <= info.start and info.end <= end for start, end in kept):
            data[info.start : info.end] = b"\xff" * (info.end - info.start)
    file.write_bytes(data)
    after = names.open_transformer(file).read_all(wanted)
    assert all(np.array_equal(before[name], np.array(after[name])) for name in wanted)


def test_a_file_of_several_parts_is_each_of_them(dev: Path, tmp_path: Path) -> None:
    """As ComfyUI's checkpoints are, each part below a prefix of its own."""
    parts = {
        "model.diffusion_model.": layouts.bfl_transformer(layouts.load(dev / "transformer")),
        "first_stage_model.": layouts.bfl_vae(layouts.load(dev / "vae")),
        "text_encoders.mistral.": layouts.load(dev / "text_encoder"),
    }
    file = layouts.save(
        tmp_path / "x.safetensors", {prefix + n: v for prefix, values in parts.items() for n, v in values.items()}
    )
    assert names.parts_in(open_tensors(file).info) == {"transformer", "text_encoder", "vae"}
    assert whole_identity(file) == whole_identity(dev / "transformer")
    assert set(names.open_vae(file).info) == set(names.open_vae(dev / "vae").info)
    places = folders.find(str(file))
    assert (places.transformer, places.vae, places.text_encoder) == (file, file, file)
    assert places.missing() == ("tokenizer",)


def test_the_vae_of_a_single_file(dev: Path, tmp_path: Path) -> None:
    values = layouts.bfl_vae(layouts.load(dev / "vae"))
    file = layouts.save(tmp_path / "vae.safetensors", values | {"bn.num_batches_tracked": mx.array(7)})
    assert any(name.startswith("decoder.up.3.") for name in values)
    shutil.copy(dev / "vae/config.json", tmp_path)
    images = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, 32, 48, 3)).astype(np.float32))
    latents = vae.load_encoder(dev).encode(images)
    assert mx.array_equal(vae.load_encoder(dev, file).encode(images), latents)
    assert mx.array_equal(vae.load_decoder(dev, file).decode(latents), vae.load_decoder(dev).decode(latents))
    of_vae = spec.read_vae_spec(file)
    identities = {
        identity.weights_identity(names.open_vae(place), vae.encoder_tensor_names(of_vae), {})
        for place in (file, dev / "vae")
    }
    assert len(identities) == 1


@pytest.mark.parametrize("decoder", [None, (32, 32, 64, 96)])
@pytest.mark.parametrize("changes", [{}, {"attention": False}, {"quant_conv": False, "post_quant_conv": False}])
def test_the_vae_spec_follows_from_shapes(tmp_path: Path, decoder: tuple[int, ...] | None, changes: dict) -> None:
    of_vae = spec.VaeSpec(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, decoder_block_out_channels=decoder, **changes
    )
    shapes = vae.encoder_tensor_names(of_vae) | vae.decoder_tensor_names(of_vae)
    values = {name: mx.zeros(shape) for name, shape in shapes.items()}
    assert spec.read_vae_spec(layouts.save(tmp_path / "bfl.safetensors", layouts.bfl_vae(values))) == of_vae
    assert spec.read_vae_spec(layouts.save(tmp_path / "diffusers.safetensors", values)) == of_vae


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_a_text_encoder_file_without_config(
    checkpoint: Path, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ComfyUI ships it: cut behind the last tap, other tensors beside it; sizes from the catalogue."""
    text = spec.read_text_spec(checkpoint / "text_encoder")
    monkeypatch.setitem(catalogue.ENCODERS, "tiny", text)  # pyright: ignore
    whole = open_encoder(checkpoint / "text_encoder", text)
    values = {prefix + name: whole.read(name) for name in whole.info}
    if prefix:
        values["tekken_model"] = mx.zeros(5, mx.uint8)
    file = layouts.save(tmp_path / "encoder.safetensors", values)
    assert spec.read_text_spec(file) == text
    captions = ["a red fox", ""]
    expected = load_text_encoder(checkpoint, text, 32).encode(captions)
    assert mx.array_equal(load_text_encoder(checkpoint, text, 32, folder=file).encode(captions), expected)
    assert encoder_identity(open_encoder(file, text), text) == encoder_identity(whole, text)


def shaped(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors of a full-size model, without its bytes."""
    file = Path("x.safetensors")
    return Tensors(file, {name: TensorInfo(file, name, "BF16", shape, 0, 0) for name, shape in shapes.items()})


@pytest.mark.parametrize("name", catalogue.ENCODERS)
def test_the_published_encoders_are_told_by_their_shapes(name: str) -> None:
    text = catalogue.ENCODERS[name]
    assert infer.text_spec(shaped(encoder_weights.tensor_shapes(text))) == text


@pytest.mark.parametrize("name", catalogue.CATALOGUE)
def test_the_published_transformers_follow_from_their_shapes(name: str) -> None:
    transformer, _ = catalogue.CATALOGUE[name]
    assert infer.transformer_spec(shaped(tensor_shapes(transformer))) == transformer


@pytest.mark.parametrize("decoder", [None, (96, 192, 384, 384)])
def test_the_published_vaes_follow_from_their_shapes(decoder: tuple[int, ...] | None) -> None:
    of_vae = spec.VaeSpec(decoder_block_out_channels=decoder)
    assert infer.vae_spec(shaped(vae.encoder_tensor_names(of_vae) | vae.decoder_tensor_names(of_vae))) == of_vae


def test_an_unknown_text_encoder_needs_its_config(klein: Path, tmp_path: Path) -> None:
    file = layouts.save(tmp_path / "encoder.safetensors", layouts.load(klein / "text_encoder"))
    with pytest.raises(InputError, match=r"no known text encoder.*vocabulary 420.*config.json beside"):
        spec.read_text_spec(file)
    shutil.copy(klein / "text_encoder/config.json", tmp_path)
    assert spec.read_text_spec(file) == spec.read_text_spec(klein / "text_encoder")


def test_a_config_of_something_else_beside_a_file_is_not_asked(dev: Path, tmp_path: Path) -> None:
    file = bfl(dev, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "anything", "num_layers": 99}))
    assert spec.read_transformer_spec(file).double_blocks == 2


def test_what_no_layout_knows_is_named(dev: Path, tmp_path: Path) -> None:
    values = layouts.bfl_transformer(layouts.load(dev / "transformer"))
    values["double_blocks.0.img_attn.extra.weight"] = mx.zeros((2, 2))
    del values["single_blocks.1.linear2.weight"]
    file = layouts.save(tmp_path / "a.safetensors", values)
    with pytest.raises(InputError) as refused:
        load_transformer(file, spec.read_transformer_spec(dev / "transformer"))
    assert "double_blocks.0.img_attn.extra.weight" in str(refused.value)
    assert "single_transformer_blocks.1.attn.to_out.weight is missing" in str(refused.value)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_another_models_file_is_refused_in_a_sentence(tmp_path: Path, part: str) -> None:
    file = layouts.save(tmp_path / "a.safetensors", {"conv.weight": mx.zeros((2, 2))})
    with pytest.raises(InputError, match="expected one tensor ending in"):
        {
            "transformer": spec.read_transformer_spec,
            "text_encoder": spec.read_text_spec,
            "vae": spec.read_vae_spec,
        }[part](file)


def test_a_broken_transformer_file_says_what_it_lacks(dev: Path, tmp_path: Path) -> None:
    values = layouts.bfl_transformer(layouts.load(dev / "transformer"))
    del values["txt_in.weight"]
    with pytest.raises(InputError, match=r"no transformer of FLUX.2: context_embedder.weight is missing"):
        spec.read_transformer_spec(layouts.save(tmp_path / "a.safetensors", values))
