"""What a plan says of the pictures, and that it is found out once a file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_relay.stages.encode import entries, images
from flux2_relay.stages.encode.dataset import DataOptions, read_samples
from flux2_relay.stages.encode.entries import LatentsIdentity, TextIdentity, Wanted
from flux2_relay.stages.encode.survey import Survey, survey

SIZES = {"square": (128, 128), "same": (200, 200), "wide": (300, 100), "small": (64, 48)}


def want_of(folder: Path, **options) -> tuple[tuple, Wanted]:
    samples = read_samples([DataOptions(path=str(folder), **{"resolutions": (128,), **options})])
    text = TextIdentity(
        encoder="e",
        tokenizer="t",
        template="p",
        taps=(1,),
        length=512,
        bits=8,
        dtype="float32",
        shares_rows=False,
    )
    return samples, entries.wanted(samples, (), text, LatentsIdentity(vae="v", tf32=False, dtype="float16"), 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, (width, height) in SIZES.items():
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").touch()
    return tmp_path


def found(folder: Path, **options) -> Survey:
    return survey(*want_of(folder, **options))


def test_buckets_are_counted_with_flips_and_repeats(folder: Path) -> None:
    plain = found(folder).buckets
    assert plain[128, 128] == 2
    assert sum(plain.values()) == 4
    assert next(iter(plain)) == (128, 128)
    assert found(folder, flip=True, repeats=3).buckets == {bucket: 6 * count for bucket, count in plain.items()}


def test_what_a_crop_loses_is_told_most_first(folder: Path) -> None:
    cut = found(folder).cut
    assert list(cut.values()) == sorted(cut.values(), reverse=True)
    assert cut["square.png"] == cut["same.png"] == 0
    (bucket,) = {of.placement.crop[2:] for of in want_of(folder)[1].latents.values() if of.image.name == "wide.png"}
    # Scaled to the bucket's height, 300 x 100 is wider than it by a few columns, and these go.
    assert cut["wide.png"] == pytest.approx(1 - bucket[0] / (3 * bucket[1]), abs=0.005)
    assert cut["wide.png"] > 0


def test_small_pictures_are_named_whatever_becomes_of_them(folder: Path) -> None:
    for upscale in (False, True):
        assert found(folder, upscale=upscale).small == {"small.png": (64, 48)}
    assert found(folder, resolutions=(48,)).small == {}


def test_it_is_told_in_lines(folder: Path) -> None:
    lines = list(found(folder).lines())
    assert "128 x 128: 2 pictures" in lines
    assert any(line.startswith("cropping loses") and "wide.png" in line for line in lines)
    assert lines[-1].startswith("1 smaller than a resolution asks for")
    assert lines[-1].endswith("small.png (64 x 48)")


def test_a_file_is_opened_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = want_of(folder)
    monkeypatch.setattr(images, "read_header", lambda path: pytest.fail(f"{path} was opened again"))
    _, again = want_of(folder)
    assert before.latents.keys() == again.latents.keys()
    monkeypatch.undo()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "wide.png")
    _, changed = want_of(folder)
    assert len(before.latents.keys() - changed.latents.keys()) == 1


@pytest.mark.parametrize("resolution", [64, 512, 1024])
def test_the_nearest_bucket_is_that_of_an_exact_search(resolution: int) -> None:
    random = np.random.default_rng(resolution)
    for width, height in random.integers(16, 5000, (300, 2)).tolist():
        aspect = abs(np.log(width / height) - np.array([np.log(w / h) for w, h in images.buckets(resolution)]))
        w, h = images.choose_bucket(width, height, resolution, upscale=True)
        assert abs(np.log(width / height) - np.log(w / h)) <= aspect.min() + 1e-12
