"""Encoders that MLX has packed before: the numbers of their own weights, told by content, refused where broken."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import layouts, model
from tiny.compare import assert_near

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import catalogue, names, packed, spec
from flux2_relay.stages.encode import encoder_weights
from flux2_relay.stages.encode.encoder_weights import encoder_identity, layer_bytes, open_encoder
from flux2_relay.stages.encode.entries import TextIdentity
from flux2_relay.stages.encode.layers import decoder_layer
from flux2_relay.stages.encode.layout import text_layout
from flux2_relay.stages.encode.options import EncodeOptions
from flux2_relay.stages.encode.text import load_text_encoder
from flux2_relay.stages.packed import Packing
from flux2_relay.stages.weights import open_tensors

CAPTIONS = ["a red fox", "", "a blue dog number two, and a red fox number one"]
MODES = {
    "affine4": {"bits": 4, "group_size": 64},
    "affine6": {"bits": 6, "group_size": 32, "mode": "affine"},
    "affine8": {"bits": 8, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}
EXACT = 3e-6
"""Both sides compute in float32 with the same values of weights; only sums differ in order."""


@pytest.fixture(scope="module", params=["dev", "klein"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints whose every matrix divides by 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.TEXT, "intermediate_size", 128)
        write = {"dev": model.write_dev, "klein": model.write_klein}[request.param]
        return write(tmp_path_factory.mktemp("wide") / request.param)


def encode(wide: Path, folder: Path, bits: int = 32, streamed: bool = False) -> np.ndarray:
    encoder = load_text_encoder(wide, spec.read_text_spec(folder), bits, folder=folder, streamed=streamed)
    return np.array(encoder.encode(CAPTIONS).astype(mx.float32))


def both(wide: Path, tmp_path: Path, settings: dict, choose: Callable = lambda path: True) -> tuple[Path, Path]:
    """A packed folder and the same weights made dense."""
    folder = layouts.pack_encoder(wide / "text_encoder", tmp_path / "packed", settings, choose)
    return folder, layouts.unpack_encoder(folder, tmp_path / "dense")


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_encoder_gives_what_its_weights_say(wide: Path, tmp_path: Path, mode: str) -> None:
    folder, dense = both(wide, tmp_path, MODES[mode])
    expected = encode(wide, dense)
    assert_near(encode(wide, folder), expected, EXACT, mode)
    assert not np.allclose(expected, encode(wide, wide / "text_encoder"), rtol=1e-3), "packing changed nothing"


def test_streamed_and_resident_are_the_same(wide: Path, tmp_path: Path) -> None:
    folder, _ = both(wide, tmp_path, MODES["mxfp8"])
    assert np.array_equal(encode(wide, folder, 16, streamed=True), encode(wide, folder, 16))


def some(path: str) -> layouts.Settings:
    """As mixed conversions are: one kind of matrix at more bits, one left as it was."""
    if path.endswith("down_proj"):
        return {"bits": 8, "group_size": 32, "mode": "affine"}
    return not path.endswith("v_proj") and not path.endswith("embed_tokens")


def test_settings_of_single_modules_hold(wide: Path, tmp_path: Path) -> None:
    folder, dense = both(wide, tmp_path, MODES["affine4"], some)
    assert json.loads((folder / "config.json").read_text())["quantization"] != MODES["affine4"]
    text = spec.read_text_spec(folder)
    found = encoder_weights.encoder_packings(open_encoder(folder, text), text)
    assert found["layers.1.mlp.down_proj"] == Packing(8, 32, "affine")
    assert found["layers.1.mlp.up_proj"] == packed.summary(found) == Packing(4, 64, "affine")
    assert not {"layers.0.self_attn.v_proj", "embed_tokens"} & set(found)
    assert_near(encode(wide, folder), encode(wide, dense), EXACT)


def test_encode_bits_are_not_applied_to_a_packed_encoder(wide: Path, tmp_path: Path) -> None:
    """Neither to what it packs nor to what it does not: 8 and 16 mean bfloat16 arithmetic alike."""
    folder, _ = both(wide, tmp_path, MODES["affine4"], some)
    text = spec.read_text_spec(folder)
    assert np.array_equal(encode(wide, folder, 8), encode(wide, folder, 16))
    layer = dict(decoder_layer(open_encoder(folder, text), 0, text, 8).named_modules())
    assert layer["self_attn.v_proj"].weight.dtype == mx.bfloat16
    assert (layer["self_attn.q_proj"].bits, layer["mlp.down_proj"].bits) == (4, 8)
    assert layer["self_attn.q_proj"].scales.dtype == mx.bfloat16


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_packed_table_are_those_of_the_dense_table(wide: Path, tmp_path: Path, mode: str) -> None:
    folder, dense = both(wide, tmp_path, MODES[mode])
    text = spec.read_text_spec(folder)
    ids = np.array([[5, 0, 5], [419, 7, 8]])
    rows, same = (encoder_weights.embedding_rows(open_encoder(f, text), ids, mx.float32) for f in (folder, dense))
    assert rows.shape == (2, 3, 64)
    assert mx.array_equal(rows, same)


def test_the_identity_covers_values_and_settings(wide: Path, tmp_path: Path) -> None:
    text = spec.read_text_spec(wide / "text_encoder")

    def of(folder: Path) -> str:
        return encoder_identity(open_encoder(folder, text), text)

    found = [of(wide / "text_encoder")]
    for name, settings in MODES.items():
        folder = layouts.pack_encoder(wide / "text_encoder", tmp_path / name, settings)
        found.append(of(folder))
        values = layouts.load(folder)
        (scales,) = (n for n in values if n.endswith("layers.0.mlp.up_proj.scales"))
        values[scales] = mx.concatenate([values[scales][1:], values[scales][:1]])
        layouts.save(folder / "model.safetensors", values)
        found.append(of(folder))
    assert len(set(found)) == len(found)


def test_keys_say_that_the_file_was_packed_and_others_stay_as_they_were() -> None:
    common = {"encoder": "e", "tokenizer": "t", "template": "p", "taps": (1,), "length": 8, "dtype": "bfloat16"}

    def quant(bits: int, packing: Packing | None = None) -> object:
        return TextIdentity(**common, shares_rows=True, bits=bits, packing=packing).key("x")["quant"]

    assert quant(16) is quant(32) is None
    assert quant(8) == {"bits": 8, "group": 64, "mode": "affine"}
    expected = {"bits": 4, "group": 16, "mode": "nvfp4", "source": "file"}
    assert quant(8, Packing(4, 16, "nvfp4")) == quant(32, Packing(4, 16, "nvfp4")) == expected


def test_a_packed_layer_counts_as_it_lies_on_disk(wide: Path, tmp_path: Path) -> None:
    folder, _ = both(wide, tmp_path, MODES["affine4"])
    text = spec.read_text_spec(folder)
    tensors = open_encoder(folder, text)
    layer = decoder_layer(tensors, 0, text, 32)
    held = sum(value.nbytes for _, value in tree_flatten(layer.parameters()) if isinstance(value, mx.array))
    assert held == layer_bytes(text, 8, tensors) < layer_bytes(text, 32) // 4
    streamed = EncodeOptions(stream="always")
    assert text_layout(text, streamed, 10**9, tensors).weights_bytes == 2 * layer_bytes(text, 8, tensors)


@pytest.mark.parametrize(
    ("mode", "part", "bad"),
    [
        ("affine4", "scales", float("nan")),
        ("affine8", "biases", float("inf")),
        ("mxfp4", "scales", 255),
        ("nvfp4", "scales", 0x7F),
        ("nvfp4", "scales", 0xFF),
    ],
)
@pytest.mark.parametrize("module", ["layers.1.mlp.gate_proj", "embed_tokens"])
def test_scales_that_are_not_finite_are_refused(
    wide: Path, tmp_path: Path, mode: str, part: str, bad: float, module: str
) -> None:
    folder = layouts.pack_encoder(wide / "text_encoder", tmp_path / "packed", MODES[mode])
    values = layouts.load(folder)
    (name,) = (n for n in values if n.endswith(f"{module}.{part}"))
    values[name][:] = bad
    layouts.save(folder / "model.safetensors", values)
    with pytest.raises(InputError, match="scales that are not finite"):
        encode(wide, folder)


def damaged(wide: Path, folder: Path, change: Callable[[layouts.Values, str], object]) -> Path:
    """A packed folder with a change to one of its matrices."""
    layouts.pack_encoder(wide / "text_encoder", folder, MODES["affine4"])
    values = layouts.load(folder)
    (path,) = (n.removesuffix(".scales") for n in values if n.endswith("layers.0.mlp.up_proj.scales"))
    change(values, path)
    layouts.save(folder / "model.safetensors", values)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda values, path: values.pop(f"{path}.biases"),
        lambda values, path: values.pop(f"{path}.weight"),
        lambda values, path: values.update({f"{path}.weight": values[f"{path}.weight"].astype(mx.float32)}),
        lambda values, path: values.update({f"{path}.weight": values[f"{path}.weight"][:, :3]}),
        lambda values, path: values.update({f"{path}.scales": values[f"{path}.scales"][:5]}),
        lambda values, path: values.update({f"{path}.scales": values[f"{path}.scales"].astype(mx.uint8)}),
        lambda values, path: values.update({f"{path}.scales": mx.zeros((128, 64))}),
    ],
)
def test_a_matrix_whose_parts_do_not_fit_is_named(wide: Path, tmp_path: Path, change: Callable) -> None:
    folder = damaged(wide, tmp_path / "x", change)
    with pytest.raises(InputError, match=r"cannot have packed:\n  layers\.0\.mlp\.up_proj: "):
        open_encoder(folder, spec.read_text_spec(folder))


def test_missing_scales_show_as_a_matrix_of_the_wrong_kind(wide: Path, tmp_path: Path) -> None:
    def change(values: layouts.Values, path: str) -> None:
        del values[f"{path}.scales"]

    folder = damaged(wide, tmp_path / "x", change)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight in model\.safetensors"):
        open_encoder(folder, spec.read_text_spec(folder))


@pytest.mark.parametrize("said", [{"bits": 8, "group_size": 64}, {"bits": 4, "group_size": 32}, {"mode": "mxfp4"}])
def test_a_config_of_another_download_is_refused(wide: Path, tmp_path: Path, said: dict) -> None:
    folder = layouts.pack_encoder(wide / "text_encoder", tmp_path / "packed", MODES["affine4"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": said}))
    with pytest.raises(InputError, match="affine 4 bit, groups of 64 in the file"):
        open_encoder(folder, spec.read_text_spec(wide / "text_encoder"))


def test_without_settings_the_shapes_tell(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single packed file too: the rows of packed matrices are their true rows."""
    folder, dense = both(wide, tmp_path, MODES["mxfp8"])
    text = spec.read_text_spec(folder)
    monkeypatch.setitem(catalogue.ENCODERS, "tiny", text)  # pyright: ignore
    (folder / "config.json").unlink()
    assert spec.read_text_spec(folder / "model.safetensors") == text
    assert names.layout_of("text_encoder", open_tensors(folder).info).startswith("packed")
    assert_near(encode(wide, folder), encode(wide, dense), EXACT)
