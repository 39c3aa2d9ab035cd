"""The VAE on a tiny random checkpoint: what it takes, what it refuses, and the order of its channels.

The numbers themselves are compared with diffusers in tests/golden.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages.spec import VaeSpec, read_vae_spec
from flux2_relay.stages.vae import (
    Decoder,
    Encoder,
    decoder_tensor_names,
    encoder_tensor_names,
    identity_config,
    load_decoder,
    load_encoder,
    patchify,
    pixel_step,
    unpatchify,
)
from flux2_relay.stages.vae_blocks import group_norm

TINY = {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [8, 8, 16, 16],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "batch_norm_eps": 1e-4,
    "patch_size": [2, 2],
}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, object],
    drop: tuple[str, ...] = (),
    extra: dict[str, mx.array] | None = None,
) -> Path:
    """A random VAE in the diffusers layout; tensors that start with one of ``drop`` are left out."""
    vae = folder / "vae"
    vae.mkdir(parents=True)
    (vae / "config.json").write_text(json.dumps(config))
    spec = read_vae_spec(folder / "vae")
    names = encoder_tensor_names(spec) | decoder_tensor_names(spec)
    random = np.random.default_rng(0)
    tensors = {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in names.items()}
    tensors["bn.running_var"] = np.square(tensors["bn.running_var"]) + np.float32(0.5)
    kept = {name: mx.array(value) for name, value in tensors.items() if not name.startswith(drop or ("\0",))}
    kept["bn.num_batches_tracked"] = mx.array(0)
    mx.save_safetensors(str(vae / "diffusion_pytorch_model.safetensors"), kept | (extra or {}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return load_encoder(checkpoint)


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return load_decoder(checkpoint)


def picture(height: int, width: int, seed: int = 0) -> mx.array:
    return mx.random.uniform(-1, 1, (1, height, width, 3), key=mx.random.key(seed))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (64, 32)])
def test_sixteen_pixels_become_one_position_and_come_back(
    encoder: Encoder, decoder: Decoder, height: int, width: int
) -> None:
    latents = encoder.encode(picture(height, width))
    assert latents.shape == (1, height // 16, width // 16, 16)
    assert latents.dtype == mx.float32
    assert decoder.decode(latents).shape == (1, height, width, 3)


def test_items_of_a_batch_do_not_touch_each_other(encoder: Encoder) -> None:
    both = encoder.encode(mx.concatenate([picture(32, 48, seed=1), picture(32, 48, seed=2)]))
    np.testing.assert_allclose(both[1], encoder.encode(picture(32, 48, seed=2))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(104, 96), (96, 104), (8, 16), (0, 16)])
def test_sizes_that_cannot_be_patched_are_refused(encoder: Encoder, height: int, width: int) -> None:
    with pytest.raises(InputError, match=rf"{width} x {height} pixels .* multiple of 16"):
        encoder.encode(mx.zeros((1, height, width, 3)))


@pytest.mark.parametrize("shape", [(16, 16, 3), (1, 16, 16, 4), (1, 3, 16, 16)])
def test_images_of_another_shape_are_refused(encoder: Encoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\[B, H, W, 3\]"):
        encoder.encode(mx.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 2, 2, 128), (2, 2, 16), (1, 0, 2, 16)])
def test_latents_of_another_shape_are_refused(decoder: Decoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"latents of shape"):
        decoder.decode(mx.zeros(shape))


def test_a_pixel_that_is_not_finite_is_refused_and_its_item_named(encoder: Encoder) -> None:
    images = mx.concatenate([picture(16, 16), mx.full((1, 16, 16, 3), float("nan"))])
    with pytest.raises(RelayError, match="item 1 is not finite"):
        encoder.encode(images)


def test_latents_that_are_all_zero_are_refused(encoder: Encoder) -> None:
    weights = {name: mx.zeros_like(value) for name, value in encoder.weights.items()}
    with pytest.raises(RelayError, match="item 0 is all zero"):
        Encoder(spec=encoder.spec, weights=weights).encode(picture(16, 16))


def test_the_decoder_refuses_latents_that_are_not_finite_but_takes_zeros(decoder: Decoder) -> None:
    with pytest.raises(RelayError, match="was to decode: item 0 is not finite"):
        decoder.decode(mx.full((1, 1, 1, 16), float("inf")))
    assert decoder.decode(mx.zeros((1, 1, 1, 16))).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("channel", [0, 5, 31])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_patch_channel_is_four_c_plus_two_rows_plus_column(channel: int, row: int, column: int) -> None:
    mean = np.zeros((1, 4, 6, 32), np.float32)
    mean[0, 2 + row, 4 + column, channel] = 1
    latents = np.array(patchify(mx.array(mean), (2, 2)))
    assert np.argwhere(latents).tolist() == [[0, 1, 2, 4 * channel + 2 * row + column]]


@pytest.mark.parametrize("patch", [(2, 2), (1, 2)])
def test_unpatchify_undoes_patchify(patch: tuple[int, int]) -> None:
    mean = mx.random.normal((2, 4, 6, 3))
    assert mx.array_equal(unpatchify(patchify(mean, patch), patch), mean)


def test_latents_are_normalised_with_the_eps_of_the_config(tmp_path: Path, encoder: Encoder) -> None:
    images, mean, var = picture(32, 32), encoder.weights["bn.running_mean"], encoder.weights["bn.running_var"]
    other = load_encoder(write_checkpoint(tmp_path, TINY | {"batch_norm_eps": 0.25}))
    raw = encoder.encode(images) * mx.sqrt(var + 1e-4) + mean
    np.testing.assert_allclose(other.encode(images), (raw - mean) / mx.sqrt(var + 0.25), rtol=1e-5, atol=1e-6)


def test_latents_of_a_mirrored_picture_are_not_the_mirrored_latents(encoder: Encoder) -> None:
    images = picture(32, 64)
    mirrored = encoder.encode(images[:, :, ::-1])
    assert not np.allclose(mirrored, encoder.encode(images)[:, :, ::-1], atol=0.1)


def test_group_norm_groups_neighbouring_channels() -> None:
    x = mx.random.normal((2, 3, 5, 8)) * 3 + 1
    weights = {"n.weight": mx.arange(8.0), "n.bias": mx.arange(8.0) / 4}
    runs = np.array(x).reshape(2, 15, 4, 2)
    mean, var = runs.mean((1, 3), keepdims=True), runs.var((1, 3), keepdims=True)
    expected = ((runs - mean) / np.sqrt(var + 1e-6)).reshape(2, 3, 5, 8) * np.arange(8) + np.arange(8) / 4
    np.testing.assert_allclose(group_norm(x, weights, "n", 4), expected, rtol=1e-5, atol=1e-5)


def test_the_posteriors_variance_has_no_say(tmp_path: Path, encoder: Encoder) -> None:
    weight = mx.full((8, 8, 1, 1), 7.0)
    weight[:4] = encoder.weights["quant_conv.weight"].transpose(0, 3, 1, 2)
    changed = load_encoder(
        write_checkpoint(tmp_path, TINY, drop=("quant_conv.weight",), extra={"quant_conv.weight": weight})
    )
    assert mx.array_equal(changed.encode(picture(16, 16)), encoder.encode(picture(16, 16)))


def test_each_half_loads_without_the_other(tmp_path: Path) -> None:
    load_encoder(write_checkpoint(tmp_path / "a", TINY, drop=("decoder.", "post_quant_conv.")))
    load_decoder(write_checkpoint(tmp_path / "b", TINY, drop=("encoder.", "quant_conv.")))


def test_missing_and_surplus_tensors_are_named_together(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, TINY, drop=("encoder.conv_in.bias", "bn."), extra={"encoder.extra": mx.zeros((1,))}
    )
    with pytest.raises(InputError) as error:
        load_encoder(folder)
    for name in ("encoder.conv_in.bias", "bn.running_mean", "bn.running_var", "encoder.extra"):
        assert name in str(error.value)


def test_groups_that_do_not_divide_the_channels_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, TINY | {"norm_num_groups": 3})
    with pytest.raises(InputError, match=r"norm_num_groups 3 does not divide"):
        load_encoder(folder)


def test_a_spec_without_quant_convs_and_attention_works(tmp_path: Path) -> None:
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    folder = write_checkpoint(tmp_path, TINY | plain)
    latents = load_encoder(folder).encode(picture(16, 32))
    assert latents.shape == (1, 1, 2, 16)
    assert load_decoder(folder).decode(latents).shape == (1, 16, 32, 3)


def test_a_small_decoder_changes_the_decoder_alone(tmp_path: Path) -> None:
    full, small = VaeSpec(), VaeSpec(decoder_block_out_channels=(96, 192, 384, 384))
    assert encoder_tensor_names(full) == encoder_tensor_names(small)
    assert decoder_tensor_names(small)["decoder.up_blocks.3.resnets.0.conv1.bias"] == (96,)
    folder = write_checkpoint(tmp_path, TINY | {"decoder_block_out_channels": [4, 4, 8, 12]})
    assert load_decoder(folder).decode(mx.ones((1, 1, 1, 16))).shape == (1, 16, 16, 3)


def test_the_released_model_has_its_known_number_of_parameters() -> None:
    def count(names: dict[str, tuple[int, ...]], *prefixes: str) -> int:
        return sum(int(np.prod(shape)) for name, shape in names.items() if name.startswith(prefixes))

    encoder_names, decoder_names = encoder_tensor_names(VaeSpec()), decoder_tensor_names(VaeSpec())
    assert count(encoder_names, "encoder.") == 34_421_696
    assert count(encoder_names, "quant_conv.") == 4_160
    assert count(decoder_names, "decoder.") == 49_619_203
    assert count(decoder_names, "post_quant_conv.") == 1_056
    assert len(encoder_names | decoder_names) == 250  # the file's 251 less bn.num_batches_tracked
    assert pixel_step(VaeSpec()) == (16, 16)


def test_the_identity_tells_what_shapes_do_not() -> None:
    assert identity_config(VaeSpec()) != identity_config(VaeSpec(batch_norm_eps=1e-5))
    assert identity_config(VaeSpec()) != identity_config(VaeSpec(norm_num_groups=16))
    assert identity_config(VaeSpec())["batch_norm_eps"] == "0.0001"
