"""Masks and references found by name, and what is said where they are not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny.pages import png

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode.dataset import DataOptions, Sample, read_samples


def write(folder: Path, *names: str) -> Path:
    """Empty files, and a caption beside each picture that begins with `p`; no picture is opened, but beside a fault."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.name.startswith("p"):
            path.with_suffix(".txt").touch()
    return folder


def read(path: Path, **options: Any) -> dict[str, Sample]:
    return {sample.id: sample for sample in read_samples([DataOptions(path=str(path), **options)])}


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read(path, **options)
    return str(error.value)


# Masks


def test_masks_have_the_base_names_of_their_pictures_at_the_same_place(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "p1.png", "sub/p1.jpg", "p2.png")
    masks = write(tmp_path / "masks", "p1.png", "sub/p1.webp", "other.png")
    found = {name: sample.mask for name, sample in read(data, masks=str(masks)).items()}
    assert found == {"p1.png": masks / "p1.png", "sub/p1.jpg": masks / "sub/p1.webp", "p2.png": None}


def test_a_folder_of_masks_inside_the_data_is_no_data(tmp_path: Path) -> None:
    data = write(tmp_path, "p1.png", "masks/p1.png")
    (data / "masks/p1.txt").unlink()
    assert {name: sample.mask for name, sample in read(data, masks=str(data / "masks")).items()} == {
        "p1.png": data / "masks/p1.png"
    }


def test_masks_may_lie_beside_their_pictures(tmp_path: Path) -> None:
    data = write(tmp_path, "p1.png", "p2.jpg", "p2-masklabel.png")
    (data / "p2-masklabel.txt").unlink()
    found = {name: sample.mask for name, sample in read(data, masks=str(data)).items()}
    assert found == {"p1.png": None, "p2.jpg": data / "p2-masklabel.png"}
    assert "data.masks: name the folder of these masks here:\n  p2-masklabel.png" in refusal(data)


def test_masks_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    data, masks = write(tmp_path / "data", "p1.png"), write(tmp_path / "masks", "q1.png")
    assert f"data.masks: {masks} has a mask for no picture" in refusal(data, masks=str(masks))
    assert "nowhere is not a folder" in refusal(data, masks=str(tmp_path / "nowhere"))
    assert f"data.masks: {data} has a mask for no picture" in refusal(data, masks=str(data))


def test_two_masks_for_one_picture_are_refused(tmp_path: Path) -> None:
    data, masks = write(tmp_path / "data", "p1.png"), write(tmp_path / "masks", "p1.png", "p1.jpg")
    assert "p1.jpg and p1.png both go with p1.png; keep one" in refusal(data, masks=str(masks))


def test_alpha_needs_no_folder(tmp_path: Path) -> None:
    (sample,) = read(write(tmp_path, "p1.png"), masks="alpha").values()
    assert sample.mask is None


# References


def test_references_come_folder_by_folder_and_by_their_numbers(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "p1.png", "p2.png")
    first = write(tmp_path / "first", "p1.jpg", "p2_10.png", "p2_2.png")
    second = write(tmp_path / "second", "p1_0.png", "p2.webp")
    found = {n: s.references for n, s in read(data, references=(str(first), str(second))).items()}
    assert found == {
        "p1.png": (first / "p1.jpg", second / "p1_0.png"),
        "p2.png": (first / "p2_2.png", first / "p2_10.png", second / "p2.webp"),
    }


def test_pictures_without_a_reference_are_named_together(tmp_path: Path) -> None:
    data, references = write(tmp_path / "data", "p1.png", "p2.png", "p3.png"), write(tmp_path / "r", "p1.png")
    for picture in data.glob("*.png"):
        picture.write_bytes(png(16, 16))
    said = refusal(data, references=(str(references),))
    assert f"data.references: {references} has no image of the same base name" in said
    assert said.endswith("for:\n  p2.png\n  p3.png")


def test_a_picture_is_not_its_own_reference(tmp_path: Path) -> None:
    data = write(tmp_path, "p1.png")
    assert "has no image of the same base name" in refusal(data, references=(str(data),))


def jsonl(folder: Path, *rows: Mapping[str, object]) -> Path:
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "list.jsonl"


@pytest.mark.parametrize("keys", [("control_path",), ("control_path_1", "control_path_0"), ("control_path_7",)])
def test_a_listing_names_references(tmp_path: Path, keys: tuple[str, ...]) -> None:
    write(tmp_path, "p1.png", *(f"control/{key}.png" for key in keys))
    row = {"image_path": "p1.png", "caption": "x", **{key: f"control/{key}.png" for key in keys}}
    (sample,) = read(jsonl(tmp_path, row)).values()
    assert sample.references == tuple(tmp_path / f"control/{key}.png" for key in sorted(keys))


def test_what_metadata_calls_a_reference_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "before/a.png")
    row = {"file_name": "a.png", "text": "x", "control_path": "before/a.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    found = read(tmp_path)
    assert {name: sample.references for name, sample in found.items()} == {"a.png": (tmp_path / "before/a.png",)}


def test_references_are_named_in_one_way_only(tmp_path: Path) -> None:
    data = write(tmp_path / "data", "p1.png", "c.png")
    folder = write(tmp_path / "r", "p1.png")
    rows = [{"image_path": "p1.png", "caption": "x", "control_path": name} for name in ("c.png", "p1.png")]
    said = refusal(jsonl(data, rows[0]), references=(str(folder),))
    assert "p1.png is given references in a listing, too; keep one way" in said
    assert "list.jsonl:2: p1.png has other references in another line" in refusal(jsonl(data, *rows))


def test_prior_pictures_are_samples_like_others(tmp_path: Path) -> None:
    (sample,) = read(write(tmp_path, "p1.png"), prior=True).values()
    assert sample.options.prior
