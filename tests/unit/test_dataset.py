"""Folders and listings read into samples, and every fault of a data set named at once."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny.pages import png

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode.captions import clean
from flux2_relay.stages.encode.dataset import IMAGE_TYPES, DataOptions, read_samples


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Files by name; what an image holds does not matter, since none is opened."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(path: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {sample.id: sample.captions for sample in read_samples([DataOptions(path=str(path), **options)])}


def refusal(*paths: Path, **options: Any) -> str:
    data = [DataOptions(path=str(path), **options) for path in paths]
    with pytest.raises(InputError) as error:
        read_samples(data)
    return str(error.value)


# Folders


def test_images_with_text_files_in_sorted_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"b.png": "", "b.txt": "bee\n", "a/z.JPG": "", "a/z.txt": "zed", "a.b.webp": "", "a.b.txt": "dots"},
    )
    assert read(tmp_path) == {"a.b.webp": ("dots",), "a/z.JPG": ("zed",), "b.png": ("bee",)}
    assert list(read(tmp_path)) == ["a.b.webp", "a/z.JPG", "b.png"]


def test_samples_carry_file_and_options(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x"})
    options = DataOptions(path=str(tmp_path), repeats=3)
    (sample,) = read_samples([options])
    assert sample.image == tmp_path / "a.png"
    assert sample.options is options


@pytest.mark.parametrize("suffix", IMAGE_TYPES)
def test_every_type_is_taken_in_either_case(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, {f"a{suffix}": "", f"b{suffix.upper()}": "", "a.txt": "", "b.txt": ""})
    assert len(read(tmp_path)) == 2


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", ".b.png": "", ".thumbs/c.png": "", "._a.png": ""})
    assert list(read(tmp_path)) == ["a.png"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "README.md": "", "notes.txt": "", "clip.gif": ""})
    assert list(read(tmp_path)) == ["a.png"]


def test_two_images_may_share_one_text_file(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.jpg": "", "a.txt": "both"})
    assert read(tmp_path) == {"a.jpg": ("both",), "a.png": ("both",)}


def test_several_folders_have_distinct_ids_and_keep_their_order(tmp_path: Path) -> None:
    first = write(tmp_path / "z", {"a.png": "", "a.txt": "one"})
    second = write(tmp_path / "y", {"a.png": "", "a.txt": "two"})
    samples = read_samples([DataOptions(path=str(first)), DataOptions(path=str(second))])
    assert [(sample.id, sample.captions) for sample in samples] == [
        ("0/a.png", ("one",)),
        ("1/a.png", ("two",)),
    ]


def test_linked_folders_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", write(tmp_path / "elsewhere", {"a.png": "", "a.txt": "x"})
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "self").symlink_to(inside)
    assert list(read(inside)) == ["link/a.png"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "fox", {"a.png": "", "a.txt": "x"})
    assert list(read(Path("~/fox"))) == ["a.png"]


def test_names_are_composed_so_that_listings_match_on_every_file_system(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "caf\u00e9.png", "text": "x"})
    write(tmp_path, {"cafe\u0301.png": "", "metadata.jsonl": row})
    assert read(tmp_path) == {"caf\u00e9.png": ("x",)}


# Listings


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_metadata_jsonl(tmp_path: Path, key: str) -> None:
    rows = [{"file_name": "a.png", key: "one "}, {"file_name": "sub/b.png", key: "two"}]
    write(tmp_path, {"a.png": "", "sub/b.png": "", "metadata.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n"})
    assert read(tmp_path) == {"a.png": ("one",), "sub/b.png": ("two",)}


def test_metadata_in_a_subfolder_names_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path, {"sub/a.png": "", "sub/metadata.jsonl": '{"file_name": "a.png", "text": "x"}'})
    assert read(tmp_path) == {"sub/a.png": ("x",)}


def test_captions_json_with_texts_and_lists(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "b.png": "", "captions.json": json.dumps({"a.png": "x", "b.png": ["y", "z"]})})
    assert read(tmp_path) == {"a.png": ("x",), "b.png": ("y", "z")}


@pytest.mark.parametrize("name", ["image_path", "file_name"])
@pytest.mark.parametrize("text", ["caption", "text"])
def test_a_jsonl_of_its_own_lists_the_images(tmp_path: Path, name: str, text: str) -> None:
    rows = [{name: "pics/b.png", text: "bee"}, {name: str(tmp_path / "a.png"), text: "ay"}]
    write(tmp_path, {"a.png": "", "pics/b.png": "", "c.png": "", "my.jsonl": "\n".join(map(json.dumps, rows))})
    assert read(tmp_path / "my.jsonl") == {"a.png": ("ay",), "pics/b.png": ("bee",)}


def test_sources_that_agree_are_fine_and_text_files_fill_gaps(tmp_path: Path) -> None:
    listing = '{"file_name": "a.png", "text": "same"}'
    write(tmp_path, {"a.png": "", "a.txt": "same\n", "b.png": "", "b.txt": "bee", "metadata.jsonl": listing})
    assert read(tmp_path) == {"a.png": ("same",), "b.png": ("bee",)}


# Captions


@pytest.mark.parametrize(
    ("text", "whole", "lines"),
    [
        ("a fox\n", ("a fox",), ("a fox",)),
        ("  a fox \t\r\n", ("a fox",), ("a fox",)),
        ("one\r\n\r\n two \n", ("one\n\n two",), ("one", "two")),
        ("", ("",), ("",)),
        (" \n\n", ("",), ("",)),
        ("e\u0301", ("e\u0301",), ("e\u0301",)),  # never normalised: other letters are other tokens
    ],
)
def test_captions_whole_and_by_line(text: str, whole: tuple[str, ...], lines: tuple[str, ...]) -> None:
    assert clean(text, "whole", None) == whole
    assert clean(text, "lines", None) == lines


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a photo of [trigger], [trigger]", "a photo of fox, fox"),
        ("in the snow", "fox in the snow"),
        ("a fox, running", "a fox, running"),
        ("a foxglove", "fox a foxglove"),
        ("a Fox", "fox a Fox"),
        ("", "fox"),
    ],
)
def test_the_trigger_word(caption: str, cleaned: str) -> None:
    assert clean(caption, "whole", "fox") == (cleaned,)


def test_a_trigger_is_no_pattern() -> None:
    assert clean("a c++ b", "whole", "c++") == ("a c++ b",)
    assert clean("ccc", "whole", "c.c") == ("c.c ccc",)


def test_each_line_gets_the_trigger(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "runs\n[trigger] sits\n"})
    assert read(tmp_path, captions="lines", trigger="fox") == {"a.png": ("fox runs", "fox sits")}


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": b"\xef\xbb\xbfa fox\r\n"})
    assert read(tmp_path) == {"a.png": ("a fox",)}


# Faults


def test_missing_captions_are_named_together_with_the_ways_out(tmp_path: Path) -> None:
    write(tmp_path, {"b.png": png(16, 16), "sub/c.jpg": png(16, 16), "a.png": png(16, 16), "a.txt": "x"})
    assert refusal(tmp_path) == (
        f"data.path: 2 images in {tmp_path} have no caption. Write what b.png shows into b.txt (an empty "
        "file trains it without words), list it in metadata.jsonl or captions.json, or take it out; "
        "without a caption:\n  b.png\n  sub/c.jpg"
    )


def test_one_missing_caption_reads_well(tmp_path: Path) -> None:
    assert "1 image in" in refusal(write(tmp_path, {"b.png": ""}))
    assert "has no caption" in refusal(tmp_path)


def test_all_faults_of_all_folders_are_named_at_once(tmp_path: Path) -> None:
    first = write(
        tmp_path / "first",
        {
            "a.png": "",
            "a.txt": b"caf\xe9",
            "b.png": "",
            "metadata.jsonl": '{"file_name": "yesterday.jpeg", "text": "x"}',
        },
    )
    second = write(tmp_path / "second", {"c.png": "", "c.txt": "[trigger] runs", "d.heic": "", "d.txt": "x"})
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refusal(first, second, empty, tmp_path / "nowhere", masks=str(tmp_path / "m"), references=("r",))
    for part in (
        f"{first / 'a.txt'}: is not UTF-8 (byte 3 is 0xe9); save it as UTF-8",
        "data.0.path: 1 image in",
        f"{first / 'metadata.jsonl'}:1: there is no image yesterday.jpeg; correct the name",
        "data.1.trigger: not set, but 1 caption in",
        f"{second}: d.heic is of a type that is not read; convert it to PNG",
        f"data.2.path: {empty} holds no images; put some there (png, ",
        f"data.3.path: {tmp_path / 'nowhere'} does not exist",
        f"data.0.masks: {tmp_path / 'm'} is not a folder; correct the path",
        "data.3.references: r is not a folder; correct the path",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["../b.png", "sub/../../b.png", "/etc/b.png", "."])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    row = json.dumps({"file_name": name, "text": "x"})
    folder = write(tmp_path / "data", {"a.png": "", "a.txt": "x", "metadata.jsonl": row})
    write(tmp_path, {"b.png": ""})
    assert f"metadata.jsonl:1: {name} leads out of {folder}" in refusal(folder)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("not json", "metadata.jsonl:2: must be a JSON object"),
        ('["a.png"]', "metadata.jsonl:2: must be a JSON object"),
        ('{"text": "x"}', "metadata.jsonl:2: names no image"),
        ('{"file_name": "a.png"}', "metadata.jsonl:2: gives a.png no caption"),
        ('{"file_name": "a.png", "text": 3}', "metadata.jsonl:2: gives a.png no caption"),
        ('{"file_name": "a.png", "text": []}', "metadata.jsonl:2: gives a.png no caption"),
        ('{"file_name": "a.pgn", "text": "x"}', "there is no image a.pgn; did you mean a.png?"),
        ('{"file_name": "notes.pdf", "text": "x"}', "notes.pdf is of a type that is not read"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "half a character"),
        ('{"file_name": "a.png", "text": "x", "control_path": "c.png"}', "2: there is no reference image c.png"),
        ('{"file_name": "a.png", "text": "x", "control_path_1": "../c.png"}', "2: control_path_1 must be the path"),
        ('{"file_name": "a.png", "text": "x", "control_path": 3}', "2: control_path must be the path of an image"),
        ('{"file_name": "a.png", "text": "other"}', "a.png has one caption in"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: str, sentence: str) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "notes.pdf": "", "metadata.jsonl": f"\n{row}\n"})
    assert sentence in refusal(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "{", '{"a.png": 1}', '{"a.png": ["x", 1]}'])
def test_a_bad_captions_json_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "captions.json": content})
    assert "captions.json: " in refusal(tmp_path)


def test_a_listing_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "", "a.txt": "x", "metadata.jsonl": b"\xff"})
    assert "metadata.jsonl: is not UTF-8 (byte 0 is 0xff)" in refusal(tmp_path)


def test_an_image_of_a_jsonl_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"my.jsonl": '{"image_path": "a.png", "caption": "x"}'})
    assert "my.jsonl:1: there is no image a.png" in refusal(tmp_path / "my.jsonl")


def test_a_file_that_is_no_jsonl_and_a_dead_link_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.xml": ""})
    assert "is neither a folder nor a .jsonl or .csv file" in refusal(tmp_path / "a.xml")
    os.symlink(tmp_path / "gone", tmp_path / "b.png")
    assert "'b.png' is a dead link" in refusal(tmp_path)


def test_no_folder_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="names no folder"):
        read_samples([])


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("resolutions", ()),
        ("resolutions", (512, 512)),
        ("trigger", " "),
        ("trigger", "fox "),
        ("background", "whit"),
    ],
)
def test_bad_values_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InputError, match=f"'{option}' must"):
        DataOptions(path="x", **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("colour", "hexadecimal"),
    [("white", "#ffffff"), ("#abc", "#aabbcc"), ("#102030", "#102030"), ("Teal", "#008080")],
)
def test_a_background_has_one_form(colour: str, hexadecimal: str) -> None:
    assert DataOptions(path="x", background=colour).background_hex() == hexadecimal


def test_the_fields_are_those_of_the_config_file() -> None:
    names = "path captions trigger repeats resolutions upscale crop flip background masks references prior"
    assert [f.name for f in dataclasses.fields(DataOptions)] == names.split()
