"""Captions to contexts on tiny encoders of both families: rows, their layout, and what they may not depend on."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import model as tiny
from tiny.compare import assert_near, relative_error

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import spec
from flux2_relay.stages.context import assemble
from flux2_relay.stages.encode.templates import FAMILIES, load_tokenizer
from flux2_relay.stages.encode.text import TextEncoder, cut, load_text_encoder

CAPTIONS = ["a red fox", "", "number two and a blue dog", "\n\nx", "a blue dog", "Fuchs läuft 🦊"]
_loaded: dict[tuple[Path, int, bool], TextEncoder] = {}


def load(folder: Path, bits: int = 32, streamed: bool = False) -> TextEncoder:
    key = (folder, bits, streamed)
    if key not in _loaded:
        _loaded[key] = load_text_encoder(folder, spec.read_text_spec(folder / "text_encoder"), bits, streamed=streamed)
    return _loaded[key]


def rows(encoder: TextEncoder, captions: list[str], **limits: Any) -> list[np.ndarray]:
    found = {index: np.array(own) for done in encoder.passes(captions, **limits) for index, own in done.rows}
    assert sorted(found) == list(range(len(captions)))
    return [found[index] for index in range(len(captions))]


def test_contexts_are_as_long_and_wide_as_the_spec_says(checkpoint: Path) -> None:
    context = load(checkpoint).encode(CAPTIONS)
    assert context.shape == (len(CAPTIONS), 48, 3 * 64)
    assert context.dtype == mx.float32
    assert mx.isfinite(context).all()


def test_a_caption_does_not_depend_on_its_company(checkpoint: Path) -> None:
    encoder = load(checkpoint)
    alone = [np.array(encoder.encode([caption]))[0] for caption in CAPTIONS]
    together = np.array(encoder.encode(CAPTIONS))
    backwards = np.array(encoder.encode(CAPTIONS[::-1]))[::-1]
    for index, expected in enumerate(alone):
        assert_near(together[index], expected, 2e-6, CAPTIONS[index])
        assert_near(backwards[index], expected, 2e-6, CAPTIONS[index])
    assert min(relative_error(a, b) for i, a in enumerate(alone) for b in alone[:i]) > 1e-2


@pytest.mark.parametrize("limits", [{"pass_tokens": 1}, {"pass_tokens": 60}, {"batch_tokens": 1}])
def test_rows_do_not_depend_on_how_much_runs_together(checkpoint: Path, limits: dict) -> None:
    encoder = load(checkpoint)
    for few, many in zip(rows(encoder, CAPTIONS, **limits), rows(encoder, CAPTIONS), strict=True):
        assert_near(few, many, 2e-6)


@pytest.mark.parametrize("bits", [32, 16, 8, 6, 4])
def test_streamed_layers_give_the_same(checkpoint: Path, bits: int) -> None:
    expected = load(checkpoint, bits).encode(CAPTIONS)
    streamed = load(checkpoint, bits, streamed=True)
    for _ in range(2):  # a second time, since the layers are read again
        assert mx.array_equal(streamed.encode(CAPTIONS), expected)


def test_progress_counts_every_token_once_over_all_layers(checkpoint: Path) -> None:
    encoder, told = load(checkpoint), []
    for _ in encoder.passes(CAPTIONS, 60, 60, told.append):
        pass
    total = sum(map(encoder.cost, CAPTIONS))
    assert sum(told) == pytest.approx(total)
    assert max(told) < total / encoder.spec.taps[-1] + 1, "never more than a layer's share"


def test_captions_that_are_not_chosen_are_left_out_and_counted_as_done(checkpoint: Path) -> None:
    encoder, told = load(checkpoint), []
    passes = encoder.passes(CAPTIONS, 60, 60, told.append, lambda indices: [i for i in indices if i != 1])
    found = {index for done in passes for index, _ in done.rows}
    assert found == set(range(len(CAPTIONS))) - {1}
    assert sum(told) == pytest.approx(sum(map(encoder.cost, CAPTIONS)))


def test_dev_keeps_own_rows_and_shares_the_others(dev: Path) -> None:
    encoder = load(dev)
    prefix_length = len(encoder.tokenizer.prefix)
    for caption, own in zip(CAPTIONS, rows(encoder, CAPTIONS), strict=True):
        assert len(own) == len(encoder.tokenizer.ids(caption)) - prefix_length
    (done,) = encoder.passes([])
    assert list(done.rows) == []
    assert done.shared["prefix"].shape == (prefix_length, 192)
    assert done.shared["pad"].shape == (1, 192)


def test_dev_lays_pads_prefix_and_own_rows_one_behind_the_other(dev: Path) -> None:
    encoder = load(dev)
    (context,) = np.array(encoder.encode(["a red fox"]))
    (own,) = rows(encoder, ["a red fox"])
    (done,) = encoder.passes([])
    prefix, pad = np.array(done.shared["prefix"]), np.array(done.shared["pad"])
    pads = 48 - len(prefix) - len(own)
    assert pads > 0
    np.testing.assert_array_equal(context[:pads], np.repeat(pad, pads, axis=0))
    np.testing.assert_array_equal(context[pads : pads + len(prefix)], prefix)
    assert_near(context[pads + len(prefix) :], own, 2e-6)


def test_klein_keeps_all_rows_and_pads_see_the_caption(klein: Path) -> None:
    encoder = load(klein)
    first, second = rows(encoder, ["a red fox", "a red dog"])
    assert first.shape == second.shape == (48, 192)
    real = len(encoder.tokenizer.ids("a red fox"))
    assert relative_error(first[real:], second[real:]) > 1e-3
    assert relative_error(first[-1:], first[-2:-1]) > 1e-4  # pads have positions of their own


def test_rows_before_the_difference_are_equal(checkpoint: Path) -> None:
    """Attention is causal: "a red" cannot know what comes behind it."""
    encoder = load(checkpoint)
    first, second = rows(encoder, ["a red fox", "a red dog number two"])
    ids = [encoder.tokenizer.own(encoder.tokenizer.ids(caption)) for caption in ("a red fox", "a red dog number two")]
    same = next(place for place, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert same >= 2
    assert_near(first[:same], second[:same], 2e-6)
    assert relative_error(first[same : same + 1], second[same : same + 1]) > 1e-2


def test_captions_beyond_the_length_are_cut_on_the_right(checkpoint: Path) -> None:
    encoder = load(checkpoint)
    long = "a red fox number one " * 40
    assert len(encoder.tokenizer.ids(long)) == 48
    assert encoder.tokenizer.ids(long) == encoder.tokenizer.ids(long + "and more")
    context, longer = np.array(encoder.encode([long, long + "and more"]))
    assert_near(context, longer, 2e-6)
    assert context.shape == (48, 192)


@pytest.mark.parametrize(("bits", "limit"), [(16, 0.02), (8, 0.1), (6, 0.2), (4, 0.5)])
def test_fewer_bits_stay_near(checkpoint: Path, bits: int, limit: float) -> None:
    expected = np.array(load(checkpoint).encode(CAPTIONS))
    context = load(checkpoint, bits).encode(CAPTIONS)
    assert context.dtype == mx.bfloat16
    error = np.linalg.norm(np.array(context.astype(mx.float32)) - expected) / np.linalg.norm(expected)
    assert 1e-3 < error < limit


def test_layers_are_quantized_as_asked(dev: Path) -> None:
    for bits in (8, 4):
        found: list[Any] = list(load(dev, bits).layers)
        assert len(found) == 3
        layer = found[0]
        assert (layer.self_attn.q_proj.bits, layer.self_attn.q_proj.group_size) == (bits, 64)
        assert layer.mlp.down_proj.weight.dtype == mx.bfloat16  # its width of 96 divides by no 64
        assert layer.input_layernorm.weight.dtype == mx.bfloat16


def test_literals_are_removed_where_the_family_removes_them(dev: Path, klein: Path) -> None:
    image, without = np.array(load(dev).encode(["a [IMG]fox[IMG]", "a fox"]))
    assert_near(image, without, 2e-6)
    image, without = np.array(load(klein).encode(["a [IMG]fox[IMG]", "a fox"]))
    assert relative_error(image, without) > 1e-2


def test_assemble_repeats_the_pad_and_keeps_the_order() -> None:
    own, prefix, pad = mx.full((2, 3), 3.0), mx.full((1, 3), 2.0), mx.full((1, 3), 1.0)
    assert assemble(own, prefix, pad, 5)[:, 0].tolist() == [1, 1, 2, 3, 3]
    assert assemble(own, prefix, pad, 3)[:, 0].tolist() == [2, 3, 3]


@pytest.mark.parametrize(
    ("costs", "limit", "expected"),
    [
        ([], 5, []),
        ([9], 5, [[0]]),
        ([2, 3, 1], 5, [[0, 1], [2]]),
        ([9, 1, 9], 5, [[0], [1], [2]]),
        ([1, 1, 1], 99, [[0, 1, 2]]),
    ],
)
def test_cut_fills_parts_in_order(costs: list[int], limit: int, expected: list[list[int]]) -> None:
    assert list(cut(costs, limit)) == expected


# What does not fit


def test_a_checkpoint_that_lacks_a_tensor_is_refused(dev: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev, tmp_path / "dev")
    file = folder / "text_encoder/model.safetensors"
    values = mx.load(str(file))
    assert isinstance(values, dict)
    mx.eval(values)
    del values["language_model.model.layers.1.mlp.up_proj.weight"]
    del values["language_model.model.layers.4.mlp.up_proj.weight"]  # beyond the last tap: not needed
    values["language_model.model.layers.9.mlp.up_proj.weight"] = mx.zeros((2, 2))
    tiny.save(file, values)
    with pytest.raises(InputError) as refused:
        load_text_encoder(folder, spec.read_text_spec(folder / "text_encoder"), 32)
    assert "layers.1.mlp.up_proj.weight is missing" in str(refused.value)
    assert "layers.9.mlp.up_proj.weight" in str(refused.value)
    assert "layers.4" not in str(refused.value)


def test_what_is_no_encoder_is_refused(dev: Path, tmp_path: Path) -> None:
    text = spec.read_text_spec(dev / "text_encoder")
    with pytest.raises(InputError, match="no text encoder"):
        load_text_encoder(dev, text, 32, folder=dev / "transformer")


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), ("{", "cannot be"), ("{}", "cannot be")])
def test_a_missing_or_broken_tokenizer_is_named(dev: Path, tmp_path: Path, content: str | None, said: str) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=said) as refused:
        load_tokenizer(folder, spec.read_text_spec(dev / "text_encoder"))
    assert str(folder / "tokenizer.json") in str(refused.value)


def test_the_tokenizer_of_the_other_family_is_refused(dev: Path, klein: Path) -> None:
    for own, other in ((dev, klein), (klein, dev)):
        with pytest.raises(InputError, match="of another model"):
            load_tokenizer(other / "tokenizer", spec.read_text_spec(own / "text_encoder"))


def test_a_tokenizer_larger_than_the_embedding_is_refused(dev: Path) -> None:
    small = dataclasses.replace(spec.read_text_spec(dev / "text_encoder"), vocabulary=300)
    with pytest.raises(InputError, match=r"knows tokens up to \d+, but the text encoder only 300 of them") as refused:
        load_tokenizer(dev / "tokenizer", small)
    assert str(dev / "tokenizer/tokenizer.json") in str(refused.value)


def test_a_length_that_the_system_text_fills_is_refused(dev: Path, tmp_path: Path) -> None:
    config = json.loads((dev / "text_encoder/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "flux2_text_length": 31}))
    with pytest.raises(InputError, match="the system text alone takes 31 of the 31"):
        load_tokenizer(dev / "tokenizer", spec.read_text_spec(tmp_path))


def test_templates_have_identities_of_their_own() -> None:
    assert len({template.identity() for template in FAMILIES.values()}) == len(FAMILIES)
