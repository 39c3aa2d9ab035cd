"""What encode does about damage: found before it begins or when it is done, and made again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny.project import Project

from flux2_relay import cache
from flux2_relay.cache import audit, encoding
from flux2_relay.cache.errors import StoreError


@pytest.fixture
def own(encoded: Callable[..., Project], pictures: Path, tmp_path: Path) -> Project:
    """An encoded project with a copy of the pictures, which a test may change."""
    project: Project = encoded()
    data = shutil.copytree(pictures, tmp_path / "pictures")
    return Project(project.folder, project.model, data).write()


def test_a_damaged_entry_is_made_again(own: Project) -> None:
    store = cache.open(own.store)
    key = min(store.keys("latents"))
    before = store.read("latents", key).array
    (own.store / "latents" / key / "zarr.json").write_bytes(b"")
    outcome = own.relay("encode")
    assert outcome.status == 0, outcome.said
    assert f"1 damaged entries are made again, {key[:12]} among them" in outcome.said
    assert "encoded 0 captions and 1 images" in outcome.said
    np.testing.assert_array_equal(store.read("latents", key).array, before)


def _flip_one_bit(own: Project, kind: str) -> str:
    key = min(cache.open(own.store).keys(kind))
    (chunk,) = (own.store / kind / key).glob("c.*")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    return key


def test_where_something_was_encoded_everything_is_read_back(own: Project) -> None:
    """A bit that changed on the disk is found while the models are at hand, not by a step of training."""
    store, key = cache.open(own.store), _flip_one_bit(own, "latents")
    (own.data / "1.txt").write_text("another caption")
    outcome = own.relay("encode")
    assert outcome.status == 0, outcome.said
    assert f"1 damaged entries are made again, {key[:12]} among them (it cannot be decoded" in outcome.said
    assert "encoded 1 captions and 1 images" in outcome.said
    assert audit.verify(store).faults == ()
    assert store.keys("latents") >= {key}


def test_where_nothing_was_missing_training_finds_the_changed_bit(own: Project) -> None:
    """Reading the whole store again at each start would take a minute; every read checks the bytes instead."""
    key = _flip_one_bit(own, "latents")
    outcome = own.relay("encode")
    assert (outcome.status, "encoded 0 captions and 0 images" in outcome.said) == (0, True)
    with pytest.raises(StoreError, match="is damaged"):
        cache.open(own.store).read("latents", key)


def test_a_disk_that_changes_all_that_is_written_is_an_error(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (own.data / "1.txt").write_text("another caption")
    real = encoding.build

    def build(*arguments: Any) -> dict[str, bytes]:
        node = real(*arguments)
        return node | {"c.0.0": node["c.0.0"][:-1] + bytes([node["c.0.0"][-1] ^ 1])}

    monkeypatch.setattr(encoding, "build", build)
    outcome = own.relay("encode")
    assert outcome.status == 1
    assert "entries keep vanishing (1 of text)" in outcome.said
    assert "or is the disk failing?" in outcome.said
    store = cache.open(own.store)
    assert len(store.missing(store.sets()[0], patient=False)["text"]) == 1
