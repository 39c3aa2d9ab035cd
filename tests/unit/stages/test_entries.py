"""What changes which keys: every option and identity that enters an entry moves its keys, and nothing else does."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_relay.stages.encode.dataset import DataOptions, read_samples
from flux2_relay.stages.encode.entries import LatentsIdentity, Prompt, TextIdentity, wanted

TEXT = TextIdentity(
    encoder="e" * 64,
    tokenizer="t" * 64,
    template="p" * 64,
    taps=(10, 20, 30),
    length=512,
    bits=8,
    dtype="bfloat16",
    shares_rows=True,
)
LATENTS = LatentsIdentity(vae="v" * 64, tf32=False, dtype="float16")
PROMPT = Prompt(text="a blue dog", negative="bad", size=(512, 512), seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """An opaque wide picture, an opaque tall one, and a transparent one, each with its caption."""
    folder = tmp_path_factory.mktemp("data")
    for name, size, mode in (("wide", (300, 200), "RGB"), ("tall", (200, 330), "RGB"), ("clear", (256, 256), "RGBA")):
        noise = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], len(mode)), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} fox")
    return folder


def entries(data: Path, text=TEXT, latents=LATENTS, seed=0, prompt=PROMPT, **options) -> dict[str, str]:
    """Every entry that is wanted: what it is -> its key."""
    samples = read_samples((DataOptions(path=str(data), **{"resolutions": (128,), **options}),))
    want = wanted(samples, [prompt], text, latents, seed)
    found = {f"text {key_object['rows']} {key_object['caption']}": key for key, key_object in want.text.items()}
    for key, of in want.latents.items():
        flipped = " flipped" if of.key["flip"] else ""
        found[f"latents {of.image.name}{flipped}"] = key
    assert len(found) == len(want.text) + len(want.latents)
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The entries whose keys differ; both sides hold the same entries."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.fixture(scope="module")
def plain(data) -> dict[str, str]:
    return entries(data)


CAPTIONS = {"text own a wide fox", "text own a tall fox", "text own a clear fox"}
ALL_TEXT = CAPTIONS | {"text own ", "text own a blue dog", "text own bad", "text prefix None", "text pad None"}
ALL_LATENTS = {"latents wide.png", "latents tall.png", "latents clear.png"}


def test_what_is_wanted(plain):
    assert set(plain) == ALL_TEXT | ALL_LATENTS
    assert len(set(plain.values())) == len(plain)


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "f" * 64},
        {"tokenizer": "f" * 64},
        {"template": "f" * 64},
        {"taps": (9, 18, 27)},
        {"length": 256},
        {"bits": 4},
        {"bits": 16},
        {"bits": 32},
        {"dtype": "float32"},  # cache.dtype
    ],
    ids=str,
)
def test_what_belongs_to_the_encoder_moves_all_text_and_nothing_else(data, plain, change):
    assert changed(plain, entries(data, text=dataclasses.replace(TEXT, **change))) == ALL_TEXT


def test_each_width_of_the_weights_has_keys_of_its_own(data):
    keys = [entries(data, text=dataclasses.replace(TEXT, bits=bits))["text own "] for bits in (32, 16, 8, 6, 4)]
    assert len(set(keys)) == 5


@pytest.mark.parametrize("change", [{"vae": "f" * 64}, {"tf32": True}, {"dtype": "float32"}, {"dtype": "bfloat16"}])
def test_what_belongs_to_the_vae_moves_all_latents_and_nothing_else(data, plain, change):
    assert changed(plain, entries(data, latents=dataclasses.replace(LATENTS, **change))) == ALL_LATENTS


def test_the_background_moves_transparent_pictures_only(data, plain):
    assert changed(plain, entries(data, background="black")) == {"latents clear.png"}
    assert changed(plain, entries(data, background="#FFFFFF")) == set()  # white by another name


def test_the_resolution_moves_all_latents_and_nothing_else(data, plain):
    assert changed(plain, entries(data, resolutions=(96,))) == ALL_LATENTS


def test_another_resolution_beside_it_moves_nothing(data, plain):
    samples = read_samples((DataOptions(path=str(data), resolutions=(128, 96)),))
    want = wanted(samples, [PROMPT], TEXT, LATENTS, 0)
    assert set(plain.values()) < set(want.text) | set(want.latents)


def test_the_crop_moves_pictures_that_are_cut_there(data, plain):
    moved = changed(plain, entries(data, crop="top"))
    assert moved  # a tall picture loses rows
    assert moved <= {"latents tall.png", "latents wide.png"}
    assert "latents clear.png" not in moved  # a square one is not cut


def test_upscaling_moves_only_pictures_that_are_too_small(data):
    small = entries(data, resolutions=(256,))
    moved = changed(small, entries(data, resolutions=(256,), upscale=True))
    assert moved
    assert "latents clear.png" not in moved  # just large enough


def test_mirroring_adds_and_moves_nothing(data, plain):
    both = entries(data, flip=True)
    assert plain.items() < both.items()
    assert set(both) - set(plain) == {f"{name} flipped" for name in ALL_LATENTS}


def test_the_seed_moves_random_crops_only(data, plain):
    assert changed(plain, entries(data, seed=1)) == set()
    crops = [entries(data, crop="random", seed=seed) for seed in range(4)]
    moved = set().union(*(changed(crops[0], other) for other in crops[1:]))
    assert moved
    assert moved <= {"latents tall.png", "latents wide.png"}


def test_the_trigger_moves_the_captions_of_the_data_only(data, plain):
    moved = entries(data, trigger="sks")
    assert {name for name in plain if moved.get(name) != plain[name]} == CAPTIONS


@pytest.mark.parametrize("options", [{"repeats": 3}, {"captions": "lines"}], ids=str)
def test_what_only_training_reads_moves_nothing(data, plain, options):
    assert entries(data, **options) == plain


def test_size_and_seed_of_a_prompt_move_nothing(data, plain):
    assert entries(data, prompt=dataclasses.replace(PROMPT, size=(64, 64), seed=9)) == plain


def test_names_and_times_of_files_move_nothing_and_one_byte_does(data, plain, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved, copy_function=shutil.copyfile)
    assert entries(moved) == plain
    picture = moved / "wide.png"
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert changed(plain, entries(moved)) == {"latents wide.png"}
    picture.write_bytes((data / "wide.png").read_bytes())
    assert entries(moved) == plain


def test_an_encoder_that_keeps_all_rows_shares_none(data, plain):
    found = entries(data, text=dataclasses.replace(TEXT, shares_rows=False))
    assert {name for name in found if name.startswith("text")} == {
        name.replace("own", "all") for name in ALL_TEXT if " own " in name
    }
    assert not set(found.values()) & {plain[name] for name in ALL_TEXT}
