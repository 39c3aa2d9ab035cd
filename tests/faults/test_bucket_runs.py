"""`cache.path: s3://...` through the whole of `relay encode` and `relay train`: as with a folder, to the last bit."""

from pathlib import Path

import mlx.core as mx
import pytest
from tiny.project import Project, relay

from flux2_relay import cache
from flux2_relay.cache.audit import verify


@pytest.fixture(autouse=True)
def _plain(_uncompiled: None) -> None:
    """Tiny models do not pay for compiled kernels."""


def _adapter(project: Project) -> dict[str, mx.array]:
    values = mx.load(str(project.run / "adapter.safetensors"))
    assert isinstance(values, dict)
    mx.eval(values)
    return values


def test_encoded_on_one_machine_and_trained_on_another_through_a_bucket(
    url: str, dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "bucket", dev, pictures).write({"cache": {"path": url}})
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    assert "and 5 images in" in outcome.said
    assert "encoded 0 captions and 0 images" in project.relay("encode").said
    assert not project.store.exists()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert project.relay("train").status == 0
    folder = Project(tmp_path / "folder", dev, pictures).write()
    assert relay("cache", "pull", "-c", folder.config, url).status == 0
    assert folder.relay("encode").said.count("encoded 0 captions and 0 images") == 1
    assert folder.relay("train").status == 0
    expected, found = _adapter(folder), _adapter(project)
    assert found.keys() == expected.keys()
    assert all(bool(mx.array_equal(found[name], expected[name])) for name in expected)

    there = cache.open(url)
    key = min(there.keys("latents"))
    there.nodes.bucket.delete(f"latents/{key}/zarr.json")  # pyright: ignore[reportAttributeAccessIssue]
    outcome = project.relay("train", "--set", "run.name=again")
    assert outcome.status == 2
    assert f"1 of latents ({key[:12]} ...) that this config needs are missing" in outcome.said
    outcome = relay("cache", "push", "-c", folder.config, url)
    assert "and 1 entries" in outcome.said
    assert verify(cache.open(url)).missing == {}
