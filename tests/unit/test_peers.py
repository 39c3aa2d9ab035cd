"""Data sets as other trainers lay them out, read unchanged."""

import json
from pathlib import Path

import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode.dataset import DataOptions, Sample, read_samples
from flux2_relay.stages.encode.notes import notes
from flux2_relay.stages.encode.templates import load_tokenizer
from flux2_relay.stages.spec import read_text_spec


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


@pytest.mark.parametrize("named", ["data", "data/metadata.csv"])
def test_diffsynth_studio_with_a_table_of_prompts_and_edits(tmp_path: Path, named: str) -> None:
    table = 'image,prompt,edit_image\na.png,"a fox, ""red""\nin snow",\nsub/b.png,make it blue,in/b.png\n'
    write(tmp_path / "data", a_dot_png="", sub__b_dot_png="", in__b_dot_png="", metadata_dot_csv=table)
    found = read(path=str(tmp_path / named))
    assert {name: sample.captions for name, sample in found.items()} == {
        "a.png": ('a fox, "red"\nin snow',),
        "sub/b.png": ("make it blue",),
    }
    assert [sample.references for sample in found.values()] == [(), (tmp_path / "data/in/b.png",)]


@pytest.mark.parametrize("first", ["file_name,text", "\ufefffile_name,text", "text,file_name", "image,caption"])
def test_an_imagefolder_with_a_table(tmp_path: Path, first: str) -> None:
    row = "a fox,a.png" if first.startswith("text") else "a.png,a fox"
    write(tmp_path, a_dot_png="", metadata_dot_csv=f"{first}\r\n{row}\r\n")
    assert read(path=str(tmp_path))["a.png"].captions == ("a fox",)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file_name,text\na.png\n", "metadata.csv:2: gives a.png no caption"),
        ("file_name;text\na.png;x\n", "metadata.csv:2: names no image"),
        ("file_name,text\nb.png,x\n", "metadata.csv:2: there is no image b.png; did you mean a.png?"),
        ("file_name,text\n../a.png,x\n", "metadata.csv:2: ../a.png leads out of"),
        ('file_name,text\na.png,"x\n', "cannot be read as CSV"),
        ("file_name,text,edit_image\na.png,x,gone.png\n", "metadata.csv:2: there is no reference image gone.png"),
    ],
)
def test_what_is_wrong_in_a_table_is_said_with_its_line(tmp_path: Path, table: str, said: str) -> None:
    write(tmp_path, a_dot_png="", metadata_dot_csv=table)
    with pytest.raises(InputError) as refused:
        read(path=str(tmp_path))
    assert said in str(refused.value)


def test_a_listed_edit_with_several_references(tmp_path: Path) -> None:
    row = {"image": "a.png", "prompt": "both", "edit_image": ["in/b.png", "in/c.png"]}
    write(tmp_path, a_dot_png="", in__b_dot_png="", in__c_dot_png="", metadata_dot_jsonl=json.dumps(row))
    found = read(path=str(tmp_path))
    assert [path.name for path in found["a.png"].references] == ["b.png", "c.png"]


@pytest.mark.parametrize(("captions", "expected"), [("whole", ("a long one",)), ("lines", ("a long one", "short"))])
def test_ai_toolkit_with_long_and_short_captions(tmp_path: Path, captions: str, expected: tuple[str, ...]) -> None:
    sidecar = json.dumps({"caption": "a long one", "caption_short": "short"})
    write(tmp_path, a_dot_png="", a_dot_json=sidecar)
    assert read(path=str(tmp_path), captions=captions)["a.png"].captions == expected


def test_a_sidecar_about_something_else_is_no_caption(tmp_path: Path) -> None:
    """Downloaders leave JSON beside pictures; a text file goes before it."""
    write(tmp_path, a_dot_png="", a_dot_json='{"caption": "by the site"}', a_dot_txt="a fox")
    assert read(path=str(tmp_path))["a.png"].captions == ("a fox",)
    (tmp_path / "a.txt").unlink()
    for other in ('{"id": 7}', "[1]", "{", '{"caption": null}'):
        (tmp_path / "a.json").write_text(other)
        with pytest.raises(InputError, match=r"no caption.*\n  a\.png"):
            read(path=str(tmp_path))


def test_kohya_with_caption_files_in_folders_of_repeats(dev: Path, tmp_path: Path) -> None:
    write(tmp_path, **{"10_fox__a_dot_png": "", "10_fox__a_dot_caption": "a fox", "1_dog__b_dot_png": ""})
    write(tmp_path, **{"1_dog__b_dot_caption": "a dog"})
    found = read(path=str(tmp_path))
    assert {name: sample.captions for name, sample in found.items()} == {
        "10_fox/a.png": ("a fox",),
        "1_dog/b.png": ("a dog",),
    }
    (note,) = notes(tuple(found.values()), load_tokenizer(dev / "tokenizer", read_text_spec(dev / "text_encoder")))
    assert note.startswith(f"{tmp_path / '10_fox'}: its name does not repeat it 10 times")


def test_two_text_files_beside_one_picture_must_agree(tmp_path: Path) -> None:
    write(tmp_path, a_dot_png="", a_dot_txt="a fox", a_dot_caption="a dog")
    with pytest.raises(InputError, match=r"one caption in .*a\.txt and another in .*a\.caption"):
        read(path=str(tmp_path))


def test_mflux_with_pictures_before_and_after(tmp_path: Path) -> None:
    files = {f"{number}_{side}_dot_png": "" for number in ("01", "02") for side in ("in", "out")}
    write(tmp_path, **files, **{"01_in_dot_txt": "make it blue", "02_in_dot_txt": "make it red"}, preview_dot_txt="x")
    found = read(path=str(tmp_path))
    assert {name: sample.captions for name, sample in found.items()} == {
        "01_out.png": ("make it blue",),
        "02_out.png": ("make it red",),
    }
    assert [sample.references for sample in found.values()] == [(tmp_path / f"0{n}_in.png",) for n in (1, 2)]


def test_pictures_with_captions_of_their_own_are_no_pair(tmp_path: Path) -> None:
    names = {f"check_{side}_dot_{end}": "x" for side in ("in", "out") for end in ("png", "txt")}
    write(tmp_path, **names)
    assert [sample.references for sample in read(path=str(tmp_path)).values()] == [(), ()]
    (tmp_path / "check_out.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "check_out.png", "text": "x"}))
    assert len(read(path=str(tmp_path))) == 2


def test_simpletuner_with_a_caption_a_line(tmp_path: Path) -> None:
    write(tmp_path, sub__a_dot_webp="", sub__a_dot_txt="a fox\n\nan animal\n")
    assert read(path=str(tmp_path), captions="lines")["sub/a.webp"].captions == ("a fox", "an animal")
