"""Files of any content: what reads them gives a value or a plain sentence, never another exception, and ends."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny.project import relay

from flux2_relay import cache
from flux2_relay.cache import audit
from flux2_relay.cache.errors import RelayError
from flux2_relay.pipeline.config import load_config
from flux2_relay.stages import names
from flux2_relay.stages.encode.dataset import DataOptions, read_samples
from flux2_relay.stages.train import adapter_file
from flux2_relay.stages.weights import open_tensors

FEW = settings(
    max_examples=25, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
BYTES = st.binary(max_size=400)


def refusal(read: Callable[[], object]) -> str | None:
    """What a reader says against its input, None where it takes it; any other exception comes through."""
    try:
        read()
    except RelayError as error:
        return str(error)
    return None


# The config reader

KEYS = [
    "run",
    "model",
    "data",
    "encode",
    "cache",
    "lora",
    "train",
    "memory",
    "previews",
    "path",
    "name",
    "rank",
    "lr",
    "steps",
    "prompts",
    "resolutions",
    "size",
]
CONFIGS = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=9) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
YAMLISH = st.text("abc:-[]{}&*!#|>'\"%@`,? \n\t0.1~<=", max_size=80)


def reads_a_config(file: Path, *overrides: str) -> None:
    said = refusal(lambda: load_config(file, overrides))
    assert said is None or str(file) in said or "--set" in said


@FEW
@given(tree=CONFIGS)
def test_any_tree_of_known_keys(tmp_path: Path, tree: object) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    reads_a_config(tmp_path / "c.yaml")


@FEW
@given(text=YAMLISH | st.text(max_size=60))
def test_any_text_for_a_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    reads_a_config(tmp_path / "c.yaml")


@FEW
@given(content=BYTES)
def test_any_bytes_for_a_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    reads_a_config(tmp_path / "c.yaml")


@FEW
@given(setting=YAMLISH | st.builds("{}.{}={}".format, st.sampled_from(KEYS), st.sampled_from(KEYS), YAMLISH))
def test_any_setting(tmp_path: Path, setting: str) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: m}")
    reads_a_config(tmp_path / "c.yaml", setting)


# The safetensors reader


def reads_weights(file: Path) -> None:
    for read in (open_tensors, names.open_transformer, names.open_vae, adapter_file.read_file):
        said = refusal(lambda read=read: read(file))
        assert said is None or file.name in said


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "U8"]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | JSON,
    }
)
NAMES = st.sampled_from(
    ["transformer_blocks.0.attn.to_q.lora_A.weight", "double_blocks.0.img_attn.qkv.weight", "__metadata__"]
)


@FEW
@given(content=BYTES)
def test_any_bytes_for_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    reads_weights(tmp_path / "w.safetensors")


@FEW
@given(header=st.dictionaries(NAMES | st.text(max_size=9), ENTRY | JSON, max_size=3) | JSON, data=BYTES)
def test_any_header_of_weights(tmp_path: Path, header: object, data: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(safetensors(json.dumps(header).encode(), data))
    reads_weights(tmp_path / "w.safetensors")


@FEW
@given(length=st.integers(0, 2**64 - 1), header=st.binary(max_size=99))
def test_any_length_of_a_header(tmp_path: Path, length: int, header: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(safetensors(header, b"", length))
    reads_weights(tmp_path / "w.safetensors")


# Captions and listings


def reads_data(folder: Path, **options: object) -> None:
    said = refusal(lambda: read_samples([DataOptions(path=str(folder), **options)]))  # pyright: ignore
    assert said is None or str(folder) in said or "data" in said or "trigger" in said


@FEW
@given(caption=BYTES, lines=st.booleans(), trigger=st.none() | st.text("ab[]\\.*+?", min_size=1, max_size=5))
def test_any_caption_file(tmp_path: Path, caption: bytes, lines: bool, trigger: str | None) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_bytes(caption)
    reads_data(tmp_path, captions="lines" if lines else "whole", trigger=trigger)


ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["file_name", "text", "caption", "control_path", "control_path_3", "image_path"]),
        st.sampled_from(["a.png", "../a.png", "/etc/passwd", "", "a\0.png", "\ud800"]) | JSON,
        max_size=4,
    )
    | JSON,
    max_size=3,
)


@FEW
@given(rows=ROWS, name=st.sampled_from(["metadata.jsonl", "captions.json"]))
def test_any_listing(tmp_path: Path, rows: list[object], name: str) -> None:
    for other in ("metadata.jsonl", "captions.json"):
        (tmp_path / other).unlink(missing_ok=True)
    (tmp_path / "a.png").touch()
    text = "\n".join(map(json.dumps, rows)) if name == "metadata.jsonl" else json.dumps(rows[0] if rows else {})
    (tmp_path / name).write_text(text)
    reads_data(tmp_path)


@FEW
@given(content=BYTES, name=st.sampled_from(["metadata.jsonl", "captions.json"]))
def test_any_bytes_for_a_listing(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_bytes(content)
    reads_data(tmp_path)
    (tmp_path / name).unlink()


# The store


@settings(parent=FEW, max_examples=12)
@given(data=st.data())
def test_any_bytes_in_any_file_of_a_store(encoded_store: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "s.zarr", ignore_errors=True)
    shutil.copytree(encoded_store, tmp_path / "s.zarr")
    files = sorted(path for path in (tmp_path / "s.zarr").rglob("*") if path.is_file())
    file = files[data.draw(st.integers(0, len(files) - 1))]
    file.write_bytes(data.draw(BYTES | JSON.map(lambda value: json.dumps(value).encode())))
    said = refusal(lambda: look_through(tmp_path / "s.zarr"))
    assert said is None or "s.zarr" in said


def look_through(path: Path) -> None:
    store = cache.open(path, "a")
    for record in store.sets():
        store.missing(record)
    for kind in ("text", "latents"):
        for key in store.keys(kind):
            refusal(lambda kind=kind, key=key: store.read(kind, key))
    audit.verify(store, repair=True)
    assert audit.verify(store).sound


@pytest.mark.parametrize("command", ["ls", "stats", "verify"])
def test_the_commands_of_a_store_whose_files_are_all_empty(encoded_store: Path, tmp_path: Path, command: str) -> None:
    shutil.copytree(encoded_store, tmp_path / "s.zarr")
    for path in (tmp_path / "s.zarr").rglob("*"):
        if path.is_file() and path.parent != tmp_path / "s.zarr":
            path.write_bytes(b"")
    outcome = relay("cache", command, "--store", tmp_path / "s.zarr")
    assert outcome.status in (0, 1, 2)
    assert "Traceback" not in outcome.said
