"""Safetensors files, whole and broken in every way that a download or a careless tool breaks them."""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.weights import open_tensors, read_header

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float32)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: object, data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def two(path: Path, **names: np.ndarray) -> Path:
    """A whole file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in (names or {"a": A, "b": B}).items():
        header[name] = entry(list(value.shape), len(data), len(data) + value.nbytes)
        data += value.tobytes()
    return write(path, header, data)


def index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        open_tensors(path)
    return str(refused.value)


def test_a_file_and_a_folder_give_the_same_values(tmp_path: Path) -> None:
    file = two(tmp_path / "m/x.safetensors")
    for source in (file, file.parent, str(file)):
        tensors = open_tensors(source)
        assert set(tensors.info) == {"a", "b"}
        np.testing.assert_array_equal(np.array(tensors.read("a")), A)
    assert tensors.read("b", mx.float16).dtype == mx.float16
    assert tensors.info["b"].end == file.stat().st_size


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    two(tmp_path / "one.safetensors", a=A)
    two(tmp_path / "two.safetensors", b=B)
    (tmp_path / "other.safetensors").write_bytes(b"not ours")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    values = open_tensors(tmp_path).read_all(["b", "a"])
    np.testing.assert_array_equal(np.array(values["a"]), A)
    np.testing.assert_array_equal(np.array(values["b"]), B)


def test_all_files_of_a_folder_without_index_are_read(tmp_path: Path) -> None:
    two(tmp_path / "one.safetensors", a=A)
    two(tmp_path / "two.safetensors", b=B)
    assert set(open_tensors(tmp_path).info) == {"a", "b"}


def test_tensors_are_renamed_and_left_out(tmp_path: Path) -> None:
    tensors = open_tensors(two(tmp_path / "x.safetensors")).rename({"a": "c"}.get)
    assert set(tensors.info) == {"c"}
    np.testing.assert_array_equal(np.array(tensors.read("c")), A)


def test_opening_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two(tmp_path / "x.safetensors")
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("a file was loaded"))
    tensors = open_tensors(tmp_path)
    tensors.rename(str.upper).check({"A": (2, 3), "B": (4,)})


def test_a_scalar_and_an_empty_tensor_are_whole(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"s": entry([], 0, 4), "e": entry([0, 3], 4, 4)}, bytes(4))
    assert {name: info.shape for name, info in open_tensors(tmp_path).info.items()} == {"s": (), "e": (0, 3)}


BROKEN: Mapping[str, tuple[object, bytes, str]] = {
    "cut off": ({"a": entry([6], 0, 24)}, bytes(20), "cut off"),
    "appended to": ({"a": entry([6], 0, 24)}, bytes(25), "appended"),
    "hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20), "hole or an overlap before tensor b"),
    "hole at the start": ({"a": entry([2], 4, 12)}, bytes(12), "hole or an overlap before tensor a"),
    "overlap": ({"a": entry([3], 0, 12), "b": entry([3], 8, 20)}, bytes(20), "hole or an overlap before tensor b"),
    "too few bytes": ({"a": entry([6], 0, 20)}, bytes(20), "tensor a of shape 6 F32 has 20 bytes"),
    "backwards": ({"a": entry([6], 24, 0)}, bytes(24), "tensor a"),
    "negative": ({"a": entry([-2, -3], 0, 24)}, bytes(24), "malformed"),
    "unknown type": ({"a": entry([6], 0, 24, "F33")}, bytes(24), "tensor a has the unknown type F33"),
    "type is a list": ({"a": {**entry([6], 0, 24), "dtype": ["F32"]}}, bytes(24), "malformed"),
    "type is a number": ({"a": {**entry([6], 0, 24), "dtype": 32}}, bytes(24), "malformed"),
    "no type": ({"a": {"shape": [6], "data_offsets": [0, 24]}}, bytes(24), "malformed"),
    "one offset": ({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0]}}, bytes(24), "malformed"),
    "offsets are text": ({"a": {"dtype": "F32", "shape": [6], "data_offsets": ["0", "24"]}}, bytes(24), "malformed"),
    "shape is text": ({"a": {"dtype": "F32", "shape": "6", "data_offsets": [0, 24]}}, bytes(24), "malformed"),
    "fractions": ({"a": {"dtype": "F32", "shape": [6.0], "data_offsets": [0, 24]}}, bytes(24), "malformed"),
    "entry is text": ({"a": "F32"}, bytes(24), "malformed"),
    "header is a list": ([1], b"", "malformed"),
    "header is a number": (12, b"", "malformed"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    header, data, said = BROKEN[kind]
    file = write(tmp_path / "x.safetensors", header, data)
    message = refusal(tmp_path)
    assert str(file) in message
    assert said in message


@pytest.mark.parametrize(
    "content", [b"", b"\x05", bytes(8), b"\xff" * 40, struct.pack("<Q", 4) + b"{\xff}x", b"version ht"]
)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert str(tmp_path / "x.safetensors") in refusal(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = two(tmp_path / "x.safetensors").read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_header(tmp_path / "x.safetensors")


def test_all_broken_files_are_named_at_once(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        two(tmp_path / f"{name}.safetensors", **{name: A})
    for name in ("one", "three"):
        with open(tmp_path / f"{name}.safetensors", "ab") as file:
            file.truncate(file.tell() - 1)
    message = refusal(tmp_path)
    assert "one.safetensors" in message
    assert "three.safetensors" in message
    assert "two.safetensors" not in message


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    two(tmp_path / "one.safetensors", a=A)
    two(tmp_path / "two.safetensors", a=A, b=B)
    assert "a stands in one.safetensors and in two.safetensors" in refusal(tmp_path)


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    two(tmp_path / "one.safetensors", a=A)
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"})
    message = refusal(tmp_path)
    assert "two.safetensors" in message
    assert "three.safetensors" in message


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": ["one"]}, {}])
def test_a_broken_index_is_refused(tmp_path: Path, weight_map: object) -> None:
    two(tmp_path / "one.safetensors", a=A)
    assert str(index(tmp_path, weight_map)) in refusal(tmp_path)


def test_an_index_that_is_no_object_is_refused(tmp_path: Path) -> None:
    for content in ("[1]", "3", "{", ""):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json" in refusal(tmp_path)


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "holds no .safetensors file" in refusal(tmp_path)


def test_check_names_every_fault_together(tmp_path: Path) -> None:
    values = {"good": A, "wide": A, "surplus": B, "known": B, "whole": B}
    two(tmp_path / "x.safetensors", **values)
    tensors = open_tensors(tmp_path)
    whole = dataclasses.replace(tensors.info["whole"], dtype="I32")
    tensors = dataclasses.replace(tensors, info={**tensors.info, "whole": whole})
    expected = {"good": (2, 3), "wide": (3, 2), "absent": (7, 1), "whole": (4,)}
    with pytest.raises(InputError) as refused:
        tensors.check(expected, ignore=lambda name: name == "known")
    message = str(refused.value)
    assert "absent is missing (expected 7x1)" in message
    assert "wide in x.safetensors: expected 3x2, found 2x3" in message
    assert "surplus in x.safetensors is not part of this model (shape 4)" in message
    assert "whole in x.safetensors has type I32" in message
    assert "known" not in message
    assert "good" not in message


def test_very_many_faults_are_counted(tmp_path: Path) -> None:
    two(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="and 12 more"):
        open_tensors(tmp_path).check({"a": (2, 3), "b": (4,)} | {f"t{n}": (1,) for n in range(32)})
