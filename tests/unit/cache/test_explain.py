"""Two keys compared in words."""

import numpy as np
import pytest

from flux2_relay import cache
from flux2_relay.cache.explain import explain, in_words, key_objects, nearest
from flux2_relay.cache.keys import key_of

WANTED = {
    "kind": "text",
    "encoder": "a" * 64,
    "template": "t",
    "quant": {"bits": 8, "mode": "affine"},
    "taps": [10, 20],
    "caption": "a fox",
}


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, []),
        ({"encoder": "b" * 64}, ["text encoder weights: bbbbbbbbbbbb there, aaaaaaaaaaaa wanted"]),
        ({"quant": None}, ["quantization of the encoder: none there, bits 8 mode 'affine' wanted"]),
        ({"taps": [9]}, ["layers whose outputs are kept: 9 there, 10 20 wanted"]),
        ({"new": True}, ["new: True there, nothing wanted"]),
        (
            {"caption": "a dog", "template": "u"},
            ["prompt template: 'u' there, 't' wanted", "caption: 'a dog' there, 'a fox' wanted"],
        ),
    ],
)
def test_explain_names_every_part_that_differs(change, lines):
    assert explain(WANTED, {**WANTED, **change}) == lines


def test_a_part_that_is_not_there():
    assert explain({"kind": "text", "tf32": False}, {"kind": "text"}) == ["TF32: nothing there, False wanted"]


def test_in_words():
    assert in_words(WANTED)[1] == "text encoder weights: aaaaaaaaaaaa"
    assert len(in_words(WANTED)) == len(WANTED)


def test_nearest_is_the_same_caption_with_the_fewest_differences(tmp_path):
    store = cache.open(tmp_path / "s", "a")
    array = np.ones((1, 2), np.float32)
    near = {**WANTED, "encoder": "b" * 64}
    for key_object in (near, {**near, "template": "u"}, {**WANTED, "caption": "a dog"}):
        store.publish("text", key_object, array, {})
    broken = store.publish("text", {**WANTED, "taps": []}, array, {})
    (store.path / "text" / broken / "zarr.json").write_text("")
    candidates = dict(key_objects(store, "text"))
    assert len(candidates) == 3
    lines = ["text encoder weights: bbbbbbbbbbbb there, aaaaaaaaaaaa wanted"]
    assert nearest(WANTED, candidates) == (key_of(near), lines)
    assert nearest({**WANTED, "caption": "a cat"}, candidates) is None
    assert nearest({"kind": "other"}, candidates) is None


def test_nearest_latents_are_of_the_same_image():
    wanted = {"kind": "latents", "source": "s", "vae": "v"}
    candidates = {"1": {**wanted, "source": "x"}, "2": {**wanted, "vae": "w"}}
    assert nearest(wanted, candidates) == ("2", ["VAE weights: 'w' there, 'v' wanted"])
