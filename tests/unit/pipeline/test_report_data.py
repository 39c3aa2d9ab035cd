"""What a run was made from, on its page: the data with pictures where they are here, the plan, keys and versions."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image
from tiny.pages import HOSTILE, Page
from tiny.project import Project, relay

from flux2_relay.pipeline import origin
from flux2_relay.pipeline.config import Config, load_config
from flux2_relay.pipeline.report import write_report
from flux2_relay.pipeline.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(encoded_store: Path, dev: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of one step, one picture of five held out; tests change a copy of it."""
    mx.disable_compile()
    project = Project(tmp_path_factory.mktemp("trained"), dev, pictures)
    project.write({"train": {"steps": 1}, "previews": {"every": 0}, "validation": {"fraction": 0.2}})
    shutil.copytree(encoded_store, project.store)
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    return project


@pytest.fixture
def run(trained: Project, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained.run, tmp_path / "tiny"))


def page(run: RunFolder) -> Page:
    return Page(write_report(run, config_of(run)).read_text("utf-8"))


def config_of(run: RunFolder) -> Config:
    return load_config(run.path / "config.yaml")


def change(run: RunFolder, edit: Callable[[dict], None]) -> None:
    told = origin.read(run)
    edit(told)
    (run.path / "origin.json").write_text(json.dumps(told))


def elsewhere(run: RunFolder, data: Path) -> None:
    """As if the run had come from another machine, and the pictures were in `data` now."""
    shutil.rmtree(run.path / "thumbnails")
    change(run, lambda told: told["set"]["made"].update(paths=["/nowhere"]))
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(re.sub(r"(?m)^- path: .*$", f"- path: {data}", text))
    assert config_of(run).data[0].path == str(data)


def test_pictures_stand_with_captions_and_buckets(run: RunFolder) -> None:
    found = page(run)
    assert "5 pictures, 5 captions, 1 held out" in found.text
    assert "64 x 64" in found.text
    assert [of["alt"] for of in found.all("img")] == [f"a red fox number {number}" for number in range(5)]
    assert all(of["src"].startswith("data:image/jpeg;base64,") for of in found.all("img"))
    assert len(re.findall(r"\.png: \d+ x \d+ ?held out", found.text)) == 1
    assert "on this machine as it was encoded" not in found.text


def test_a_thumbnail_is_cut_as_the_picture_was_encoded(run: RunFolder) -> None:
    for sample in origin.read(run)["data"]["shown"]:
        (latents,) = sample["latents"]
        with Image.open(origin.thumbnail_of(run, latents)) as image:
            assert list(image.size) == latents["size"]


def test_the_plan_keys_and_versions_are_told(run: RunFolder, trained: Project) -> None:
    told = origin.read(run)
    text = page(run).text
    for part in ("encoder", "tokenizer", "template", "vae"):
        assert told["set"]["identities"][part] in text
    assert told["set"]["key"] in text
    assert f"mlx {told['versions']['mlx']}" in text
    assert told["plan"]["in_words"] in text
    assert "2 + 2 blocks, not distilled" in text
    assert re.search(r"planned \d", text)
    assert "path: " + str(trained.data) in text  # the config


def test_what_each_model_took_is_told(run: RunFolder) -> None:
    with open(run.path / "phases.jsonl", "a") as file:
        file.write(json.dumps({"name": HOSTILE, "seconds": 61, "peak_bytes": 2e9, "predicted_bytes": None}) + "\n[]\n")
    found = page(run)
    text = found.html.partition('<div class="scroll models">')[2].partition("</table>")[0]
    assert re.findall('<th scope="row">([^<]*)</th>', text)[0] == "transformer"
    assert '<td class="number">1 min 01 s</td><td class="number">2 GB</td><td class="number"></td>' in text
    assert HOSTILE in found.text


def test_captions_and_names_are_text(run: RunFolder) -> None:
    def spoil(told: dict) -> None:
        for sample in told["data"]["shown"]:
            sample["captions"], sample["id"] = [HOSTILE], HOSTILE
        told["versions"]["mlx"] = told["set"]["identities"]["vae"] = HOSTILE

    change(run, spoil)
    found = page(run)
    found.asks_for_nothing()
    assert found.text.count(HOSTILE) == 12
    assert {of["alt"] for of in found.all("img")} == {HOSTILE}


def test_pictures_that_are_elsewhere_are_missed_and_taken_where_they_are_unchanged(
    run: RunFolder, pictures: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(pictures, tmp_path / "moved")
    Image.new("RGB", (64, 64)).save(data / "3.png")
    (data / "4.png").unlink()
    elsewhere(run, data)
    found = page(run)
    assert not found.all("img")
    assert "None of these pictures is on this machine as it was encoded" in found.text
    assert found.text.count("a red fox number") == 5
    assert origin.take_thumbnails(run, config_of(run)) == 3
    assert origin.take_thumbnails(run, config_of(run)) == 0
    found = page(run)
    assert len(found.all("img")) == 3
    assert "2 of these 5 pictures are not on this machine" in found.text


def test_the_command_takes_what_is_here(run: RunFolder, pictures: Path) -> None:
    elsewhere(run, pictures)
    assert relay("report", run.path).status == 0
    assert len(Page((run.path / "report.html").read_text("utf-8")).all("img")) == 5


@pytest.mark.parametrize("told", [None, "", "{", "[]", '{"data": {}}', '{"data": {"shown": 3}, "set": 3, "plan": []}'])
def test_a_run_that_does_not_say_is_shown_all_the_same(run: RunFolder, told: str | None) -> None:
    (run.path / "origin.json").unlink() if told is None else (run.path / "origin.json").write_text(told)
    assert "does not say what it was trained on" in page(run).text
    assert relay("report", run.path).status == 0


def test_training_goes_on_where_nothing_of_it_can_be_kept(encoded: Callable[..., Project]) -> None:
    project = encoded(train={"steps": 1}, previews={"every": 0})
    (project.run / "origin.json").mkdir(parents=True)
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert "the report will not say all that this run was made from" in outcome.said
    assert (project.run / "adapter.safetensors").exists()


def test_only_some_of_many_are_shown_and_all_are_counted(encoded_store: Path) -> None:
    from flux2_relay import cache

    store = cache.open(encoded_store)
    (record,) = store.sets()
    samples = [{**record.body["samples"][n % 5], "id": f"{n}.png", "repeats": 2} for n in range(500)]
    told = origin.data_of(store, {**record.body, "samples": samples}, 0.0)
    assert (told["pictures"], told["held_out"], sum(count for *_, count in told["buckets"])) == (500, 0, 500)
    assert 40 <= len(told["shown"]) <= origin.MOST_SHOWN
    assert told["shown"][0]["id"] == "0.png"
    assert int(told["shown"][-1]["id"][:-4]) > 480
