"""Masks and references from files into the store: what is read, what is keyed, what is refused, what training gets."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny.compare import assert_near
from tiny.project import Project

from flux2_relay import cache
from flux2_relay.cache.errors import InputError
from flux2_relay.cache.sets import needs
from flux2_relay.stages import spec, vae
from flux2_relay.stages.encode import images, masks
from flux2_relay.stages.encode.dataset import DataOptions, read_samples
from flux2_relay.stages.encode.entries import LatentsIdentity, Prompt, TextIdentity, Wanted, wanted
from flux2_relay.stages.encode.images import Placement
from flux2_relay.stages.encode.notes import notes
from flux2_relay.stages.encode.templates import load_tokenizer

TEXT = TextIdentity(
    encoder="e",
    tokenizer="t",
    template="p",
    taps=(1, 2),
    length=512,
    bits=8,
    dtype="bfloat16",
    shares_rows=False,
)
LATENTS = LatentsIdentity(vae="v", tf32=False, dtype="float16")
WHOLE = Placement(resize=(32, 48), crop=(0, 0, 32, 48))


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape)


# Masks


def test_a_position_gets_the_mean_of_its_pixels(tmp_path: Path) -> None:
    pixels = noise(48, 32)
    mask = masks.read_mask(save(tmp_path / "m.png", pixels), WHOLE, "grey")
    assert (mask.shape, mask.dtype) == ((3, 2), np.float32)
    assert_near(mask, pixels.reshape(3, 16, 2, 16).mean(axis=(1, 3)) / 255, 1e-6)


def test_a_mask_is_cut_and_mirrored_with_its_picture(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64))
    pixels[16:32, 32:48] = 255  # one white patch
    path = save(tmp_path / "m.png", pixels)
    cut = Placement(resize=(64, 64), crop=(16, 0, 48, 32))
    assert masks.read_mask(path, cut, "grey").tolist() == [[0, 0, 0], [0, 1, 0]]
    left = Placement(resize=(64, 64), crop=(32, 0, 32, 32))
    mirrored = Placement(resize=(64, 64), crop=(32, 0, 32, 32), flip=True)
    assert masks.read_mask(path, left, "grey").tolist() == [[0, 0], [1, 0]]
    assert masks.read_mask(path, mirrored, "grey").tolist() == [[0, 0], [0, 1]]


def test_a_smaller_mask_is_scaled_to_its_picture(tmp_path: Path) -> None:
    small = masks.read_mask(save(tmp_path / "s.png", np.kron([[0, 1], [1, 0]], np.ones((8, 8))) * 255), WHOLE, "grey")
    large = masks.read_mask(save(tmp_path / "l.png", np.kron([[0, 1], [1, 0]], np.ones((24, 16))) * 255), WHOLE, "grey")
    assert_near(small, large, 1e-6)


@pytest.mark.parametrize("levels", ["L", "RGB", "1", "I;16"])
def test_white_is_one_in_every_kind_of_file(tmp_path: Path, levels: str) -> None:
    white = np.full((48, 32), 65535, np.uint16) if levels == "I;16" else np.full((48, 32), 255, np.uint8)
    picture = Image.fromarray(white)
    (picture if levels == "I;16" else picture.convert(levels)).save(tmp_path / "m.png")
    assert masks.read_mask(tmp_path / "m.png", WHOLE, "grey").tolist() == [[1, 1]] * 3


def test_alpha_is_the_opacity_whatever_the_colour(tmp_path: Path) -> None:
    pixels = noise(48, 32, 4)
    mask = masks.read_mask(save(tmp_path / "m.png", pixels), WHOLE, "alpha")
    assert_near(mask, pixels[..., 3].reshape(3, 16, 2, 16).mean(axis=(1, 3)) / 255, 1e-6)
    black = np.zeros((48, 32, 4))
    black[..., 3] = 255  # opaque black is trained on
    assert masks.read_mask(save(tmp_path / "b.png", black), WHOLE, "alpha").min() == 1


@pytest.mark.parametrize(("channel", "word"), [("grey", "black"), ("alpha", "transparent")])
def test_a_mask_that_leaves_nothing_is_refused(tmp_path: Path, channel: masks.Channel, word: str) -> None:
    pixels = np.zeros((64, 64, 4))
    pixels[48:] = 255  # below what is kept
    path = save(tmp_path / "m.png", pixels)
    with pytest.raises(InputError, match=rf"m\.png: the mask is {word} wherever the picture is kept"):
        masks.read_mask(path, Placement(resize=(64, 64), crop=(0, 0, 64, 48)), channel)


def test_a_mask_key_holds_what_it_depends_on() -> None:
    plain = masks.mask_key("a", WHOLE, "grey")
    others = [
        masks.mask_key("b", WHOLE, "grey"),
        masks.mask_key("a", WHOLE, "alpha"),
        masks.mask_key("a", Placement(resize=(32, 64), crop=WHOLE.crop), "grey"),
        masks.mask_key("a", Placement(resize=WHOLE.resize, crop=(0, 0, 16, 16)), "grey"),
        masks.mask_key("a", Placement(resize=WHOLE.resize, crop=WHOLE.crop, flip=True), "grey"),
    ]
    assert all(other != plain for other in others)


# What a set lists


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, `a` with a mask; each with a square reference and a wide one."""
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate("ab"):
        save(root / f"pictures/{name}.png", noise(96, 64, 3, seed=seed))
        (root / f"pictures/{name}.txt").write_text(f"make {name} blue")
        save(root / f"before/{name}.png", noise(64, 64, 3, seed=10 + seed))
        save(root / f"style/{name}_0.png", noise(48, 96, 3, seed=20 + seed))
    half = np.zeros((96, 64))
    half[:48] = 255
    save(root / "masks/a.png", half)
    return root


def want_of(data: Path, prompts: tuple[Prompt, ...] = (), **options) -> Wanted:
    given = {"masks": str(data / "masks"), "references": (str(data / "before"), str(data / "style"))}
    given |= {"resolutions": (64,), **options}
    return wanted(read_samples([DataOptions(path=str(data / "pictures"), **given)]), prompts, TEXT, LATENTS, seed=0)


def test_references_are_latents_in_buckets_of_their_own(data: Path) -> None:
    want = want_of(data)
    for sample in want.samples:
        (listed,) = sample["latents"]
        assert (listed["h"], listed["w"]) == (5, 3)
        assert listed["reference_sizes"] == [[4, 4], [3, 5]]
        for key, folder, (height, width) in zip(
            listed["references"], ("before", "style"), listed["reference_sizes"], strict=True
        ):
            assert want.latents[key].image.parent == data / folder
            assert want.latents[key].placement.crop[2:] == (16 * width, 16 * height)
    assert [sample["latents"][0]["mask"] is None for sample in want.samples] == [False, True]
    assert len(want.latents) == 6
    assert {kind: len(keys) for kind, keys in needs({"samples": want.samples}).items()} == {
        "text": 2, "latents": 6, "masks": 1,
    }  # fmt: skip


def test_without_references_a_set_says_nothing_of_sizes(data: Path) -> None:
    (listed, _) = (sample["latents"][0] for sample in want_of(data, references=()).samples)
    assert set(listed) == {"key", "h", "w", "references", "mask"}
    assert listed["references"] == []


def test_a_mirrored_picture_has_mirrored_companions(data: Path) -> None:
    want = want_of(data, flip=True)
    for sample in want.samples:
        plain, mirrored = sample["latents"]
        for key, is_mirrored in ((plain, False), (mirrored, True)):
            assert [want.latents[k].placement.flip for k in (key["key"], *key["references"])] == [is_mirrored] * 3
            assert key["mask"] is None or want.masks[key["mask"]].placement.flip == is_mirrored


def test_a_random_crop_cuts_picture_and_reference_alike(data: Path, tmp_path: Path) -> None:
    for name in ("p", "r"):
        save(tmp_path / f"{name}/x.png", noise(200, 64, 3, seed=len(name)))
    (tmp_path / "p/x.txt").touch()
    options = DataOptions(path=str(tmp_path / "p"), references=(str(tmp_path / "r"),), resolutions=(32,), crop="random")
    want = wanted(read_samples([options]), (), TEXT, LATENTS, seed=4)
    assert len({of.placement.crop for of in want.latents.values()}) == 1


def test_each_resolution_has_its_own_references(data: Path) -> None:
    for sample in want_of(data, resolutions=(64, 48)).samples:
        large, small = sample["latents"]
        assert large["reference_sizes"] != small["reference_sizes"]


def test_prior_and_repeats_stand_in_the_set(data: Path) -> None:
    assert [(s["prior"], s["repeats"]) for s in want_of(data, prior=True, repeats=3).samples] == [(True, 3)] * 2
    assert not any(sample["prior"] for sample in want_of(data).samples)


def test_alpha_masks_only_pictures_that_have_transparency(data: Path, tmp_path: Path) -> None:
    save(tmp_path / "clear.png", noise(64, 64, 4))
    save(tmp_path / "opaque.png", noise(64, 64, 3))
    for name in ("clear", "opaque"):
        (tmp_path / f"{name}.txt").touch()
    options = DataOptions(path=str(tmp_path), masks="alpha", resolutions=(64,))
    want = wanted(read_samples([options]), (), TEXT, LATENTS, seed=0)
    assert [sample["latents"][0]["mask"] is None for sample in want.samples] == [False, True]
    assert [of.channel for of in want.masks.values()] == ["alpha"]


def test_a_mask_of_another_shape_is_refused_and_named(data: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(64, 64))
    with pytest.raises(InputError, match=r"a\.png: is 64 x 64 pixels, but the picture that it masks is 64 x 96"):
        want_of(data, masks=str(tmp_path))


def test_references_of_a_preview_are_as_large_as_it_at_most(data: Path) -> None:
    prompt = Prompt(text="x", negative="", size=(32, 64), seed=0, references=(data / "before/a.png",))
    want = want_of(data, (prompt,))
    (key,) = want.prompts[0]["references"]
    _, _, width, height = want.latents[key].placement.crop
    assert width * height <= 32 * 64


def test_a_preview_reference_that_is_not_there_is_named(data: Path) -> None:
    prompt = Prompt(text="x", negative="", size=(64, 64), seed=0, references=(data / "gone.png",))
    with pytest.raises(InputError, match=r"gone\.png: no such file or directory"):
        want_of(data, (prompt,))


# Notes


def test_special_tokens_in_captions_are_noted(dev: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(64, 64, 3))
    (tmp_path / "a.txt").write_text("an [INST] fox </s>, </s>")
    save(tmp_path / "b.png", noise(64, 64, 3))
    (tmp_path / "b.txt").write_text("a fox in [brackets] < s >")
    tokenizer = load_tokenizer(dev / "tokenizer", spec.read_text_spec(dev / "text_encoder"))
    *_, note = notes(read_samples([DataOptions(path=str(tmp_path))]), tokenizer)  # for so short a model both are long
    assert "captions of 1 picture spell special tokens" in note
    assert "a.png ([INST] </s>)" in note


@pytest.mark.parametrize("family", ["dev", "klein"])
def test_captions_over_the_limit_are_noted(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(family)
    tokenizer = load_tokenizer(model / "tokenizer", spec.read_text_spec(model / "text_encoder"))
    fits = next(n for n in range(tokenizer.length, 0, -1) if not tokenizer.beyond("a " * n))
    for name, words in (("fits", fits), ("long", fits + 3), ("longer", fits + 40)):
        save(tmp_path / f"{name}.png", noise(64, 64, 3))
        (tmp_path / f"{name}.txt").write_text(" ".join(["a"] * words))
    samples = read_samples([DataOptions(path=str(tmp_path))])
    lost = {sample.id: tokenizer.beyond(sample.captions[0]) for sample in samples}
    assert lost["fits.png"] == 0 < lost["long.png"] < lost["longer.png"]
    (note,) = notes(samples, tokenizer)
    assert f"captions of 2 pictures are over the limit of {tokenizer.length} tokens" in note
    assert f"longer.png (the last {lost['longer.png']}), long.png (the last {lost['long.png']});" in note
    assert len(tokenizer.ids(samples[1].captions[0])) == tokenizer.length


def test_a_disk_that_may_fill_is_told_before_encoding(
    dev: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, dev, data / "pictures").write()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, (1 << 30) + 1000))
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    (told,) = re.findall(r"entries to come take up to ([\d.]+) kB, and 1 kB are free", outcome.said)
    stored = sum(path.stat().st_size for path in project.store.rglob("c.*"))
    assert stored < float(told) * 1000 < 10 * stored + 40 * 12_288
    assert outcome.said.index("disk may be full") < outcome.said.index("encoded ")
    assert "disk may be full" not in project.relay("encode").said  # nothing is to come


def test_pictures_without_a_mask_are_noted(dev: Path, data: Path) -> None:
    tokenizer = load_tokenizer(dev / "tokenizer", spec.read_text_spec(dev / "text_encoder"))
    samples = read_samples([DataOptions(path=str(data / "pictures"), masks=str(data / "masks"))])
    assert list(notes(samples, tokenizer)) == [
        f"{data / 'pictures'}: 1 of 2 pictures have no mask; all of such a picture is trained on"
    ]


# Both stages


@pytest.fixture(scope="module")
def project(dev: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An edit training, encoded and trained for two steps."""
    project = Project(tmp_path_factory.mktemp("edit"), dev, data / "pictures")
    previews = [{"prompt": "make it red", "references": [str(data / "before/a.png")]}]
    project.write(
        {
            "data": {
                "masks": str(data / "masks"),
                "references": [str(data / "before"), str(data / "style")],
                "prior": True,
            },
            "train": {"steps": 2, "prior_weight": 0.5},
            "previews": {"every": 2, "prompts": previews},
        }
    )
    for command in ("encode", "train"):
        outcome = project.relay(command)
        assert outcome.status == 0, outcome.said
    return project


def test_stage_one_encodes_masks_and_references(project: Project, dev: Path, data: Path) -> None:
    store = cache.open(project.store)
    (record,) = store.sets()
    assert store.missing(record) == {}
    first = record.body["samples"][0]["latents"][0]
    assert store.read("masks", first["mask"]).array.tolist() == [[1] * 3, [1] * 3, [0.5] * 3, [0] * 3, [0] * 3]
    placement = images.place((64, 64), (64, 64))
    pixels = images.read_pixels(data / "before/a.png", placement)
    expected = np.array(vae.load_encoder(dev).encode(pixels[None])[0])  # type: ignore[arg-type]
    assert_near(store.read("latents", first["references"][0]).array, expected, 1e-5)
    assert record.body["prompts"][0]["references"] == [first["references"][0]]  # one picture in one bucket: one entry


def test_encoding_again_does_nothing(project: Project) -> None:
    outcome = project.relay("encode")
    assert outcome.status == 0
    assert "encoded 0 captions and 0 images" in outcome.said


def test_stage_two_trains_on_them(project: Project) -> None:
    lines = [json.loads(line) for line in (project.run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert (project.run / "previews/000002-00.safetensors").exists()
