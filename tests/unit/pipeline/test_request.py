"""Which set a config asks for: paths count by their last part, and no other data set is taken for this one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny.project import Project

from flux2_relay.pipeline.config import Config, load_config
from flux2_relay.pipeline.request import set_request


def request(project: Project) -> dict:
    return set_request(load_config(project.config))


@pytest.fixture
def moved(encoded: Callable[..., Project], tmp_path: Path) -> Project:
    """Model, data and store under another parent, as on another machine; nothing is encoded there."""
    here = encoded()
    there = tmp_path / "elsewhere"
    model = shutil.copytree(here.model, there / "models" / here.model.name)
    data = shutil.copytree(here.data, there / "sets" / here.data.name)
    project = Project(there / "project", model, data).write()
    shutil.copytree(here.store, project.store)
    return project


def test_a_store_that_was_copied_elsewhere_still_trains(moved: Project) -> None:
    outcome = moved.relay("train", "--max-steps", 1)
    assert outcome.status == 0, outcome.said


def test_it_trains_without_the_pictures(moved: Project) -> None:
    shutil.rmtree(moved.data)
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.rmtree(moved.model / part)
    outcome = moved.relay("train", "--max-steps", 1)
    assert outcome.status == 0, outcome.said


def test_another_model_folder_is_another_request(moved: Project) -> None:
    model = moved.model.rename(moved.model.with_name("dev-finetuned"))
    outcome = Project(moved.folder, model, moved.data).write().relay("train", "--max-steps", 1)
    assert outcome.status == 2
    assert "model.path ('dev' there, 'dev-finetuned' here)" in outcome.said
    assert "relay encode" in outcome.said


def test_another_data_folder_is_another_request(moved: Project) -> None:
    data = moved.data.rename(moved.data.with_name("dogs"))
    outcome = Project(moved.folder, moved.model, data).write().relay("train", "--max-steps", 1)
    assert outcome.status == 2
    assert "data.path ('pictures' there, 'dogs' here)" in outcome.said


def change_caption(data: Path) -> None:
    (data / "2.txt").write_text("a blue dog")


def change_picture(data: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(data / "2.png")


def add_picture(data: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(data / "9.png")
    (data / "9.txt").write_text("a blue dog")


@pytest.mark.parametrize("change", [change_caption, change_picture, add_picture])
def test_other_pictures_in_a_folder_of_the_same_name_are_not_taken_for_these(
    moved: Project, pictures: Path, change: Callable[[Path], None]
) -> None:
    change(moved.data)
    outcome = moved.relay("train", "--max-steps", 1)
    assert outcome.status == 2
    assert "of other pictures or captions" in outcome.said
    assert str(pictures) in outcome.said


def test_of_two_sets_of_the_same_names_each_project_gets_its_own(moved: Project) -> None:
    change_caption(moved.data)
    assert moved.relay("encode").status == 0
    other = Project(moved.folder / "b", moved.model, moved.data.parent.parent / "b" / moved.data.name)
    shutil.copytree(moved.data, other.data)
    add_picture(other.data)
    other.write({"cache": {"path": str(moved.store)}})
    assert other.relay("encode").status == 0
    for project, count in ((moved, 5), (other, 6)):
        outcome = project.relay("train", "--max-steps", 1)
        assert outcome.status == 0, outcome.said
        assert len(found(project)) == count


def found(project: Project) -> list:
    from flux2_relay import cache
    from flux2_relay.pipeline.request import find_set

    config = load_config(project.config)
    return find_set(cache.open(config.cache.path), config).body["samples"]


def test_every_path_counts_by_its_last_part(dev: Path, tmp_path: Path) -> None:
    def of(parent: str, **changes: object) -> dict:
        data = {"path": f"{parent}/fox/", "masks": f"{parent}/masks", "references": [f"{parent}/before"]}
        prompt = {"prompt": "a fox", "references": [f"{parent}/9.png"]}
        project = Project(tmp_path, Path(parent) / "dev", Path(parent) / "fox").write(
            {
                "model": {"text_encoder": f"{parent}/enc", "vae": f"{parent}/vae", "tokenizer": f"{parent}/tok"},
                "data": {**data, **changes},
                "previews": {"prompts": [prompt]},
            }
        )
        return request(project)

    assert of("/a") == of("~/b/c") == of("d/../e")
    for key, value in {"path": "/a/fax", "masks": "/a/other", "references": ["/a/after"], "masks ": None}.items():
        assert of("/a") != of("/a", **{key.strip(): value}), key
    assert of("/a", masks="alpha")["data"][0]["masks"] == "alpha"


def test_the_name_of_a_model_is_no_part_of_it(encoded: Callable[..., Project]) -> None:
    config = load_config(encoded().config)
    named: Config = replace(config, model=replace(config.model, name="dev"))
    assert set_request(named) == set_request(config)
