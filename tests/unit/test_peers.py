"""Data sets as other trainers lay them out, read unchanged."""

import json
from pathlib import Path

import pytest

from flux2_relay.stages.encode.dataset import DataOptions, Sample, read_samples


def write(folder: Path, **files: str) -> Path:
    """Files by their names, "__" for "/" and "_dot_" for "."; pictures are empty, since none is opened."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def read(**options) -> dict[str, Sample]:
    return {sample.id: sample for sample in read_samples([DataOptions(**options)])}


def test_musubi_tuner_with_a_jsonl_and_several_controls(tmp_path: Path) -> None:
    write(tmp_path, img__a_dot_png="", ctl__a_0_dot_png="", ctl__a_1_dot_png="", img__b_dot_png="", ctl__b_dot_png="")
    rows = [
        {"image_path": str(tmp_path / "img/a.png"), "caption": "make it blue",
         "control_path_0": str(tmp_path / "ctl/a_0.png"), "control_path_1": str(tmp_path / "ctl/a_1.png")},
        {"image_path": str(tmp_path / "img/b.png"), "caption": "make it red", "control_path": "ctl/b.png"},
    ]  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(path=str(tmp_path / "list.jsonl"))
    assert [sample.captions for sample in found.values()] == [("make it blue",), ("make it red",)]
    assert [[path.name for path in sample.references] for sample in found.values()] == [
        ["a_0.png", "a_1.png"],
        ["b.png"],
    ]


def test_musubi_tuner_with_a_control_directory(tmp_path: Path) -> None:
    write(tmp_path, img__a_dot_jpg="", img__a_dot_txt="blue", ctl__a_0_dot_png="", ctl__a_1_dot_png="")
    found = read(path=str(tmp_path / "img"), references=(str(tmp_path / "ctl"),))
    assert [path.name for path in found["a.jpg"].references] == ["a_0.png", "a_1.png"]


def test_ai_toolkit_with_trigger_masks_and_control_folders(tmp_path: Path) -> None:
    names = {f"{folder}__x__{n}_dot_png": "" for folder in ("img", "one", "two", "mask") for n in "ab"}
    write(tmp_path, **names, img__x__a_dot_txt="[trigger] sits", img__x__b_dot_txt="running")
    one, two, mask = (str(tmp_path / folder) for folder in ("one", "two", "mask"))
    found = read(path=str(tmp_path / "img"), trigger="fox", masks=mask, references=(one, two))
    assert [sample.captions for sample in found.values()] == [("fox sits",), ("fox running",)]
    assert found["x/a.png"].mask == Path(mask, "x/a.png")
    assert found["x/b.png"].references == (Path(one, "x/b.png"), Path(two, "x/b.png"))


def test_onetrainer_with_masks_beside_and_prompts_by_line(tmp_path: Path) -> None:
    write(tmp_path, a_dot_png="", a_dot_txt="a fox\na red fox\n", **{"a-masklabel_dot_png": ""})
    found = read(path=str(tmp_path), captions="lines", masks=str(tmp_path))
    assert found["a.png"].captions == ("a fox", "a red fox")
    assert found["a.png"].mask == tmp_path / "a-masklabel.png"


def test_diffusion_pipe_with_captions_json_and_a_mask_path(tmp_path: Path) -> None:
    write(
        tmp_path, d__a_dot_png="", d__captions_dot_json=json.dumps({"a.png": ["a fox", "an animal"]}), m__a_dot_png=""
    )
    found = read(path=str(tmp_path / "d"), masks=str(tmp_path / "m"))
    assert found["a.png"].captions == ("a fox", "an animal")
    assert found["a.png"].mask == tmp_path / "m/a.png"


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_an_imagefolder_of_hugging_face(tmp_path: Path, key: str) -> None:
    write(tmp_path, train__a_dot_png="", train__metadata_dot_jsonl=json.dumps({"file_name": "a.png", key: "a fox"}))
    assert {name: sample.captions for name, sample in read(path=str(tmp_path)).items()} == {"train/a.png": ("a fox",)}
