"""What a checkpoint says of itself, and how a wrong one is refused."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.config import ModelOptions
from flux2_relay.stages import spec
from flux2_relay.stages.encode.templates import FAMILIES
from flux2_relay.stages.spec import CATALOGUE
from flux2_relay.stages.train.transformer import block_linears, double_shapes, single_shapes, tensor_shapes

# name: width, tensors, parameters, those of a double and a single block, linears of all blocks
PUBLISHED = {
    "dev": (6144, 331, 32_223_281_152, 981_467_648, 490_733_824, 192),
    "klein-4b": (3072, 169, 3_875_544_576, 245_367_296, 122_683_648, 100),
    "klein-base-4b": (3072, 169, 3_875_544_576, 245_367_296, 122_683_648, 100),
    "klein-9b": (4096, 233, 9_078_581_248, 436_208_128, 218_104_064, 144),
    "klein-base-9b": (4096, 233, 9_078_581_248, 436_208_128, 218_104_064, 144),
}


def count(shapes) -> int:
    return sum(map(prod, shapes.values()))


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_has_the_published_sizes(name: str) -> None:
    transformer, distilled = CATALOGUE[name]
    hidden, tensors, parameters, double, single, linears = PUBLISHED[name]
    assert transformer.hidden == hidden
    assert transformer.mlp_width == 3 * hidden
    assert len(tensor_shapes(transformer)) == tensors
    assert count(tensor_shapes(transformer)) == parameters
    assert (count(double_shapes(transformer)), count(single_shapes(transformer))) == (double, single)
    assert len(block_linears(transformer)) == linears
    assert distilled == (name in ("klein-4b", "klein-9b"))
    assert transformer.guidance == (name == "dev")


def test_every_name_of_the_catalogue_may_stand_in_a_config() -> None:
    assert set(get_args(get_type_hints(ModelOptions)["name"])) == {"auto", *CATALOGUE}


def test_a_dev_like_checkpoint_is_read(dev: Path) -> None:
    model = spec.from_checkpoint(dev)
    assert model.name == "dev"  # a size that no catalogue lists goes by its folder
    assert (model.transformer.double_blocks, model.transformer.single_blocks) == (2, 2)
    assert (model.transformer.hidden, model.transformer.guidance) == (64, True)
    assert (model.text.family, model.text.layers, model.text.taps, model.text.length) == ("mistral", 5, (1, 2, 3), 48)
    assert (model.text.head_dim, model.text.kv_heads, model.text.rope_theta) == (32, 2, 1e6)
    assert model.text.context_width == model.transformer.context_width == 192
    assert model.vae.block_out_channels == (8, 8, 16, 16)
    assert model.vae.decoder_block_out_channels is None
    assert not model.distilled


def test_a_klein_like_checkpoint_is_read(klein: Path, tmp_path: Path) -> None:
    model = spec.from_checkpoint(klein)
    assert (model.text.family, model.transformer.guidance, model.distilled) == ("qwen3", False, False)
    shutil.copytree(klein, tmp_path / "k")
    (tmp_path / "k/model_index.json").write_text('{"is_distilled": true}')
    assert spec.from_checkpoint(tmp_path / "k").distilled
    (tmp_path / "k/model_index.json").unlink()
    assert not spec.from_checkpoint(str(tmp_path / "k")).distilled


def test_published_families_have_their_taps_and_length_when_the_config_is_silent(dev: Path, tmp_path: Path) -> None:
    for model_type, taps in (("mistral", (10, 20, 30)), ("qwen3", (9, 18, 27))):
        config = json.loads((dev / "text_encoder/config.json").read_text())["text_config"]
        config |= {"model_type": model_type, "num_hidden_layers": 40}
        (tmp_path / "config.json").write_text(json.dumps(config))
        text = spec.read_text_spec(tmp_path)
        assert (text.taps, text.length) == (taps, 512)
        assert text.family in FAMILIES


CHANGES = [
    ("transformer", "num_layers", "2", "num_layers"),
    ("transformer", "num_layers", 0, "num_layers"),
    ("transformer", "num_attention_heads", True, "num_attention_heads"),
    ("transformer", "axes_dims_rope", [4, 4, 4], "axes_dims_rope"),
    ("transformer", "axes_dims_rope", [3, 5, 4, 4], "axes_dims_rope"),
    ("transformer", "axes_dims_rope", 16, "axes_dims_rope"),
    ("transformer", "axes_dims_rope", ["4", 4, 4, 4], "axes_dims_rope"),
    ("transformer", "mlp_ratio", "wide", "mlp_ratio"),
    ("transformer", "mlp_ratio", -1, "mlp_ratio"),
    ("transformer", "eps", [1], "eps"),
    ("transformer", "guidance_embeds", "no", "guidance_embeds"),
    ("transformer", "patch_size", 2, "patch_size"),
    ("transformer", "out_channels", 64, "out_channels"),
    ("text_encoder", "model_type", "llama", "model_type"),
    ("text_encoder", "model_type", ["mistral"], "model_type"),
    ("text_encoder", "hidden_size", None, "hidden_size"),
    ("text_encoder", "head_dim", 2.5, "head_dim"),
    ("text_encoder", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1}, "rotary scaling"),
    ("text_encoder", "rope_parameters", {}, "rope_theta"),
    ("text_encoder", "rope_parameters", "default", "rope_parameters"),
    ("text_encoder", "rope_scaling", {"factor": 2}, "rotary scaling"),
    ("text_encoder", "rms_norm_eps", 0, "rms_norm_eps"),
    ("text_encoder", "rope_parameters", {"rope_theta": "1e6"}, "rope_theta"),
    ("text_encoder", "flux2_taps", [], "taps"),
    ("text_encoder", "flux2_taps", [2, 1], "taps"),
    ("text_encoder", "flux2_taps", [1, 1, 2], "taps"),
    ("text_encoder", "flux2_taps", [0, 1, 2], "flux2_taps"),
    ("text_encoder", "flux2_taps", [1, 2, 5], "taps"),
    ("text_encoder", "flux2_taps", 3, "taps"),
    ("text_encoder", "flux2_text_length", "long", "flux2_text_length"),
    ("vae", "act_fn", "relu", "act_fn"),
    ("vae", "_class_name", "AutoencoderKL", "AutoencoderKL"),
    ("vae", "latent_channels", "many", "latent_channels"),
    ("vae", "block_out_channels", 8, "block_out_channels"),
    ("vae", "decoder_block_out_channels", 8, "decoder_block_out_channels"),
    ("vae", "patch_size", "2x2", "patch_size"),
    ("vae", "patch_size", [2], "patch_size"),
    ("vae", "batch_norm_eps", "small", "batch_norm_eps"),
]


@pytest.fixture(scope="session")
def configs(dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config files of a checkpoint alone: no spec needs more."""
    folder = tmp_path_factory.mktemp("configs") / "dev"
    shutil.copytree(dev, folder, ignore=lambda _, names: [n for n in names if n.endswith(".safetensors")])
    return folder


@pytest.mark.parametrize(("part", "key", "value", "said"), CHANGES)
def test_a_wrong_value_is_refused_by_file_and_key(
    configs: Path, tmp_path: Path, part: str, key: str, value: object, said: str
) -> None:
    folder = shutil.copytree(configs, tmp_path / "dev")
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    inner = config["text_config"] if part == "text_encoder" and not key.startswith("flux2") else config
    inner[key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        spec.from_checkpoint(folder)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe"])
def test_a_missing_or_damaged_config_is_named(configs: Path, tmp_path: Path, part: str, content: bytes | None) -> None:
    folder = shutil.copytree(configs, tmp_path / "dev")
    path = folder / part / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        spec.from_checkpoint(folder)
    assert str(path) in str(refused.value)


def test_a_folder_that_mixes_two_models_is_refused(configs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(configs, tmp_path / "dev")
    path = folder / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "joint_attention_dim": 128}))
    with pytest.raises(InputError, match=r"192 channels \(3 taps x 64\).*takes 128"):
        spec.from_checkpoint(folder)


def test_a_named_model_must_be_what_the_folder_holds(tmp_path: Path) -> None:
    for name, (transformer, distilled) in CATALOGUE.items():
        spec.check_name(name, transformer, distilled, tmp_path)
        spec.check_name("auto", transformer, distilled, tmp_path)
        assert spec.known_name(transformer, distilled) == name
    with pytest.raises(InputError, match=r"model.name is 'dev', but .* holds klein-base-4b"):
        spec.check_name("dev", *CATALOGUE["klein-base-4b"], tmp_path)
    with pytest.raises(InputError, match="holds klein-4b"):
        spec.check_name("klein-base-4b", *CATALOGUE["klein-4b"], tmp_path)
