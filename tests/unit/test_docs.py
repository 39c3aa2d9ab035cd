"""What the documentation promises: its links, its names, its snippet, and the starting points."""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import yaml

from flux2_relay import cache
from flux2_relay.pipeline import config_page
from flux2_relay.pipeline.cli import cli
from flux2_relay.pipeline.config import Config

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("configs/*.md")),
]
STARTING_POINTS = sorted((ROOT / "configs").glob("*.yaml"))
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
RNG = np.random.default_rng(0)


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@EVERY_PAGE
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text("utf-8").splitlines()
    # A row of a table cannot be broken.
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))]


@EVERY_PAGE
def test_commands_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    said = re.findall(r"(?:`|bin/)relay ([a-z]+)", text)
    assert not set(said) - set(cli.commands)
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert not set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)", text, re.MULTILINE)) - {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


def keys_of(kind: type, path: str = "") -> set[str]:
    """Dotted names of all that a config may say."""
    found = set()
    hints: dict[str, Any] = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        below = hints[field.name]
        below = get_args(below)[0] if get_origin(below) is tuple else below
        found.add(f"{path}{field.name}")
        if dataclasses.is_dataclass(below):
            found |= keys_of(below, f"{path}{field.name}.")  # type: ignore[arg-type]
    return found


@EVERY_PAGE
def test_keys_exist(page: Path) -> None:
    known = keys_of(Config)
    sections = "|".join(field.name for field in dataclasses.fields(Config))
    said = re.findall(rf"`((?:{sections})\.[a-z_]+)[:`]", page.read_text("utf-8"))
    assert not set(said) - known


def test_the_page_of_all_keys_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "config.md").read_text("utf-8")
    assert written == config_page.page(), "run python -m flux2_relay.pipeline.config_page > docs/config.md"
    leaves = {key for key in keys_of(Config) if "." in key and "." not in key.replace(".", "", 1)}
    assert not [key for key in leaves if f"| `{key}` |" not in written]


def test_the_readme_names_six_files_to_read() -> None:
    order = (ROOT / "README.md").read_text("utf-8").split("in this order", 1)[1].split("\n## ", 1)[0]
    assert len(re.findall(r"^\d\. \[", order, re.MULTILINE)) == 6


@pytest.mark.parametrize("path", STARTING_POINTS, ids=lambda path: path.name)
def test_a_starting_point_says_how_it_is_used(path: Path) -> None:
    head = path.read_text("utf-8").split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.parametrize("name", ["klein-base-4b", "klein-base-9b", "dev"])
def test_every_key_of_a_starting_point_is_explained(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text("utf-8")
    assert f"make encode CONFIG=configs/{name}.yaml" in text
    assert yaml.safe_load(text)["model"]["name"] == name
    assert not re.findall(r"^ +(?:- )?[a-z_]+: [^#\n]+$", text.split("  prompts:")[0], re.MULTILINE)
    for line in re.findall(r"^ *# ([a-z_]+: .*)$", text.split("\n\n", 1)[1], re.MULTILINE):
        assert "  # " in line, f"{line!r} is not explained"


@pytest.mark.parametrize("name", ["klein-base-4b", "klein-base-9b", "dev"])
def test_what_a_starting_point_comments_out_would_load(name: str, tmp_path: Path) -> None:
    from flux2_relay.pipeline.config import load_config

    text = (ROOT / "configs" / f"{name}.yaml").read_text("utf-8")
    head, rest = text.split("\n\n", 1)
    filled = re.sub(r"^( *)# ([a-z_]+: )", r"\1\2", rest, flags=re.MULTILINE)
    assert filled != rest
    (tmp_path / "c.yaml").write_text(f"{head}\n{filled}", encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").data[0].flip


def bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16, cut, as uint16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def test_the_snippet_reads_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = cache.open(tmp_path / "store.zarr", "a")
    rows = {name: RNG.standard_normal((n, 6)).astype(np.float32) for name, n in (("own", 3), ("prefix", 2), ("pad", 1))}
    key: dict[str, object] = {"kind": "text", "dtype": "bfloat16", "max_length": 9}
    keys = {name: store.publish("text", {**key, "rows": name}, bits(array), {}) for name, array in rows.items()}
    whole = RNG.standard_normal((9, 6)).astype(np.float32)
    klein = store.publish("text", {"kind": "text", "dtype": "float32", "rows": "all"}, whole, {})
    picture = RNG.standard_normal((4, 5, 8)).astype(np.float16)
    latents = store.publish("latents", {"kind": "latents", "dtype": "float16"}, picture, {})
    sample = {"id": "fox.png", "latents": [{"key": latents, "h": 4, "w": 5, "references": [], "mask": None}]}
    shared = {name: keys[name] for name in ("prefix", "pad")}
    store.publish_set({"shared": shared, "samples": [{**sample, "text": [keys["own"]]}]}, {"at": "2026-01-02"})
    store.publish_set({"shared": {"prefix": None}, "samples": []}, {"at": "2026-01-01"})
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "store.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(snippet, names)
    assert capsys.readouterr().out == "fox.png (9, 6) (4, 5, 8)\n"
    cut = {name: (bits(array).astype(np.uint32) << 16).view(np.float32) for name, array in rows.items()}
    expected = np.concatenate([*[cut["pad"]] * 4, cut["prefix"], cut["own"]])
    np.testing.assert_array_equal(names["context"](keys["own"]), expected)
    np.testing.assert_array_equal(names["read"]("latents", latents), picture.astype(np.float32))
    names["newest"] = {"shared": {"prefix": None}}
    np.testing.assert_array_equal(names["context"](klein), whole)
