"""The VAE in strips of rows against the whole picture at once: numbers, memory, and the choice between both."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny.compare import assert_near

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import vae, vae_strips
from flux2_relay.stages.spec import VaeSpec
from flux2_relay.stages.vae_blocks import decoder_layers, encoder_layers, walk
from flux2_relay.stages.vae_strips import Strips, rows_for, strips_bytes, walk_strips, whole_bytes


def picture(height: int, width: int, batch: int = 1) -> mx.array:
    return mx.random.uniform(-1, 1, (batch, height, width, 3), key=mx.random.key(height))


@pytest.mark.parametrize("rows", [2, 4, 6, 16, 32])
@pytest.mark.parametrize(("height", "width"), [(64, 32), (48, 64), (16, 16)])
def test_encoding_in_strips_is_encoding_the_whole(dev: Path, rows: int, height: int, width: int) -> None:
    encoder = vae.load_encoder(dev)
    layers, groups = encoder_layers(encoder.spec), encoder.spec.norm_num_groups
    images = picture(height, width, batch=2)
    whole = walk(layers, images, encoder.weights, groups)
    assert_near(np.array(walk_strips(layers, images, encoder.weights, groups, rows)), np.array(whole), 1e-5)


@pytest.mark.parametrize("rows", [2, 4, 6, 16])
@pytest.mark.parametrize(("height", "width"), [(8, 4), (6, 8), (2, 2)])
def test_decoding_in_strips_is_decoding_the_whole(dev: Path, rows: int, height: int, width: int) -> None:
    decoder = vae.load_decoder(dev)
    layers, groups = decoder_layers(decoder.spec), decoder.spec.norm_num_groups
    mean = mx.random.normal((2, height, width, decoder.spec.latent_channels), key=mx.random.key(rows))
    whole = walk(layers, mean, decoder.weights, groups)
    assert_near(np.array(walk_strips(layers, mean, decoder.weights, groups, rows)), np.array(whole), 1e-5)


def test_queries_are_split_further_where_their_scores_are_large(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vae.load_encoder(dev)
    layers, groups = encoder_layers(encoder.spec), encoder.spec.norm_num_groups
    whole = walk(layers, picture(64, 64), encoder.weights, groups)
    monkeypatch.setattr(vae_strips, "_SCORES_BYTES", 1)
    assert_near(np.array(walk_strips(layers, picture(64, 64), encoder.weights, groups, 16)), np.array(whole), 1e-5)


def test_statistics_of_values_far_from_zero_keep_their_digits(dev: Path) -> None:
    encoder = vae.load_encoder(dev)
    name = "encoder.mid_block.resnets.0.norm1"
    channels = encoder.weights[f"{name}.weight"].shape[0]
    x = 1000 + mx.random.normal((1, 32, 8, channels), key=mx.random.key(1))
    strips = Strips(32, 2)
    for top in range(0, 32, 2):
        strips.add(x[:, top : top + 2])
    norm = vae_strips._norm_of(strips, encoder.weights, name, 2)
    exact = np.array(x, np.float64).reshape(32, 8, 2, channels // 2)
    exact = (exact - exact.mean((0, 1, 3), keepdims=True)) / np.sqrt(exact.var((0, 1, 3), keepdims=True) + 1e-6)
    weight, bias = (np.array(encoder.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
    assert_near(np.array(norm(x))[0], exact.reshape(32, 8, channels) * weight + bias, 1e-4)


# Strips


def test_a_window_reaches_over_strips_and_stops_at_the_border() -> None:
    strips = Strips(6, 2)
    for top in (0, 2, 4):
        strips.add(mx.arange(top, top + 2, dtype=mx.float32).reshape(1, 2, 1, 1))
    assert strips.window(-1, 3).flatten().tolist() == [0, 1, 2]
    assert strips.window(3, 7).flatten().tolist() == [3, 4, 5]
    strips.drop(3)
    assert strips.window(0, 6).flatten().tolist() == [2, 3, 4, 5]


# Memory


HALVES = {"encoder": (encoder_layers, (1, 512, 128, 3)), "decoder": (decoder_layers, (1, 64, 16, 32))}


@pytest.mark.parametrize("half", HALVES)
def test_memory_stays_under_what_was_foretold(half: str) -> None:
    """Of layers as deep as the released model's and an eighth as wide."""
    spec = VaeSpec(block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
    of, shape = HALVES[half]
    layers = of(spec)
    weights = random_weights(layers)
    x = mx.random.normal(shape, key=mx.random.key(0))
    mx.eval(x)
    foretold = strips_bytes(layers, shape, 8)
    assert peak(lambda: walk_strips(layers, x, weights, 8, 8)) <= 1.1 * foretold
    assert foretold < 0.5 * peak(lambda: walk(layers, x, weights, 8))


def random_weights(layers: tuple) -> dict[str, mx.array]:
    from flux2_relay.stages.vae_blocks import tensor_shapes

    weights = {}
    for name, shape in tensor_shapes(layers).items():
        value = 0.05 * mx.random.normal(shape, key=mx.random.key(len(name)))
        weights[name] = mx.contiguous(value.transpose(0, 2, 3, 1)) if value.ndim == 4 else value
    mx.eval(weights)
    return weights


def peak(work: Callable[[], mx.array]) -> int:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(("size", "limit"), [(1024, 1.3e9), (2048, 4.7e9)])
def test_a_large_picture_fits_into_little_memory(size: int, limit: float) -> None:
    for layers, shape in (
        (encoder_layers(VaeSpec()), (1, size, size, 3)),
        (decoder_layers(VaeSpec()), (1, size // 8, size // 8, 32)),
    ):
        rows = rows_for(layers, shape, int(limit))
        assert rows is not None
        assert rows >= 8


# The choice


def test_the_whole_picture_where_it_fits_else_the_highest_strips() -> None:
    layers, shape = encoder_layers(VaeSpec()), (1, 1024, 1024, 3)
    whole = whole_bytes(layers, shape, gpu=False)
    assert rows_for(layers, shape, whole) is None
    assert rows_for(layers, shape, whole - 1) == 128
    assert rows_for(layers, shape, strips_bytes(layers, shape, 32)) == 32
    assert rows_for(layers, shape, whole_bytes(layers, shape, gpu=True), gpu=True) is None


def test_too_small_a_budget_is_refused_with_the_least_that_works(dev: Path) -> None:
    encoder = vae.load_encoder(dev)
    with pytest.raises(InputError, match=r"memory\.budget: .* a picture of 48 x 32 pixels; .* is the least"):
        encoder.encode(picture(32, 48), budget_bytes=1)
    decoder = vae.load_decoder(dev)
    with pytest.raises(InputError, match=r"a picture of 48 x 32 pixels"):
        decoder.decode(mx.ones((1, 2, 3, 128)), budget_bytes=1)


def test_a_budget_changes_how_and_not_what(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(
        vae_strips, "walk_strips", lambda *arguments: chosen.append(arguments[-1]) or walk_strips(*arguments)
    )
    encoder, decoder = vae.load_encoder(dev), vae.load_decoder(dev)
    for half, given, work, of in (
        (encoder, picture(96, 32), encoder.encode, encoder_layers),
        (decoder, mx.random.normal((1, 6, 2, 128), key=mx.random.key(3)), decoder.decode, decoder_layers),
    ):
        shape = given.shape if half is encoder else (1, 12, 4, decoder.spec.latent_channels)
        held = sum(value.nbytes for value in half.weights.values())
        budget = held + strips_bytes(of(half.spec), shape, 8)
        assert_near(np.array(work(given, budget)), np.array(work(given)), 1e-5)
    assert chosen == [8, 8]


def test_stage_one_says_how_pictures_go_and_refuses_a_hopeless_budget(
    encoded: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = encoded(data={"resolutions": [48]})
    monkeypatch.setattr(vae_strips, "whole_bytes", lambda *_: 1 << 60)
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    assert "in strips of 128 rows" in outcome.said
    monkeypatch.setattr(vae_strips, "strips_bytes", lambda *_: 1 << 60)
    refused = encoded(data={"resolutions": [32]}).relay("encode")
    assert refused.status == 2
    assert "memory.budget: " in refused.said
    assert "the least that works" in refused.said
