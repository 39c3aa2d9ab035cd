"""`relay init`: what it finds in a data set and a machine, and that its file goes through `relay plan` at once."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny.project import Outcome, relay

from flux2_relay.pipeline import commented, init_data
from flux2_relay.pipeline.commented import Line
from flux2_relay.pipeline.config import Config, load_config
from flux2_relay.stages import memory


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def pictures(folder: Path, captions: list[str], size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Path:
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        Image.new(mode, size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def init(folder: Path, *arguments: object) -> Config:
    outcome = relay("init", folder, "-o", "c.yaml", *arguments)
    assert outcome.status == 0, outcome.said
    return load_config("c.yaml")


def refused(outcome: Outcome, *said: object) -> None:
    assert outcome.status == 2, outcome.said
    for words in said:
        assert str(words) in outcome.said


def machine(monkeypatch: pytest.MonkeyPatch, gigabytes: float, is_gpu: bool = True) -> None:
    monkeypatch.setattr(memory, "device_bytes", lambda: int(gigabytes * 1e9))
    monkeypatch.setattr(memory, "is_gpu", lambda: is_gpu)
    monkeypatch.setattr(memory, "is_cuda", lambda: False)


def test_a_plan_can_follow_at_once(klein: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "fox", ["a red fox", "a red fox in snow", "a fox asleep"], (80, 64))
    outcome = relay("init", folder, "--model", klein)
    assert outcome.status == 0, outcome.said
    assert "next       relay plan -c fox.yaml" in outcome.said
    assert all(len(line) <= 80 for line in outcome.said.splitlines() if str(tmp_path) not in line)
    planned = relay("plan", "-c", "fox.yaml")
    assert planned.status == 0, planned.said
    assert "next       relay encode -c fox.yaml" in planned.said


def test_every_value_has_its_reason(klein: Path, tmp_path: Path) -> None:
    init(pictures(tmp_path / "fox", ["a fox"] * 3), "--model", klein)
    lines = Path("c.yaml").read_text().splitlines()
    for before, line in pairwise(lines):
        if re.match(r"  (- |  )?(# )?[a-z_]+: \S", line):
            assert "  # " in line or before.lstrip().startswith("# ") or "- path" in line, line


def test_a_file_that_is_there_stays_without_force(klein: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "fox", ["a fox"] * 3)
    Path("c.yaml").write_text("mine")
    refused(relay("init", folder, "-o", "c.yaml", "--model", klein), "c.yaml exists", "--force")
    assert Path("c.yaml").read_text() == "mine"
    assert relay("init", folder, "-o", "c.yaml", "--model", klein, "--force").status == 0
    assert load_config("c.yaml").run.name == "fox"
    refused(relay("init", folder, "-o", "no/c.yaml", "--model", klein), "no/c.yaml", "cannot be written")


def test_what_encode_would_refuse_is_refused(klein: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "fox", ["a fox"] * 3)
    (folder / "1.txt").unlink()
    refused(relay("init", folder, "--model", klein), "1.png", "no caption")
    (folder / "1.txt").write_text("a fox")
    refused(relay("init", folder, "--model", tmp_path / "none"), tmp_path / "none")
    (folder / "2.png").write_bytes(b"GIF, or so")
    refused(relay("init", folder, "--model", klein), folder / "2.png")
    refused(relay("init", tmp_path / "none", "--model", klein), tmp_path / "none", "does not exist")
    assert not Path("fox.yaml").exists()


# The data set


def test_a_word_that_begins_every_caption_is_the_trigger(tmp_path: Path) -> None:
    found = init_data.look(pictures(tmp_path / "d", ["zwx cat asleep", "zwx, a cat", "zwx at night"]))
    assert found.options.trigger == "zwx"
    found = init_data.look(pictures(tmp_path / "e", ["a cat", "a dog", "a cow"]))
    assert found.options.trigger is None


def test_a_placeholder_is_filled_from_the_folder_of_its_number(tmp_path: Path) -> None:
    found = init_data.look(pictures(tmp_path / "10_sks dog", ["[trigger] runs", "a picture of [trigger]", "a dog"]))
    assert (found.options.trigger, found.options.repeats) == ("sks", 10)
    assert [sample.captions for sample in found.samples] == [("sks runs",), ("a picture of sks",), ("sks a dog",)]


def test_masks_beside_pictures_and_transparency_are_noticed(klein: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "d", ["a cat", "a dog"])
    Image.new("L", (64, 64)).save(folder / "0-masklabel.png")
    assert init(folder, "--model", klein).data[0].masks == str(folder)
    init(pictures(tmp_path / "e", ["a cat", "a\ndog"], mode="RGBA"), "--model", klein, "--force")
    text = Path("c.yaml").read_text()
    assert "# 2 pictures have transparent pixels" in text
    assert "# masks: alpha" in text
    assert "# 1 caption with several lines" in text
    assert "# captions: lines" in text


def test_previews_are_drawn_of_its_own_captions(klein: Path, tmp_path: Path) -> None:
    captions = ["zwx: a 'cat' # one\nand more", 'zwx "two" é', "zwx 3"]
    config = init(pictures(tmp_path / "d", captions), "--model", klein)
    prompts = [picture.prompt for picture in config.previews.pictures()]
    assert prompts == [captions[0], captions[1], "a photo of a red fox in the snow"]
    assert config.previews.size == (64, 64)


def test_references_go_with_the_previews_of_edit_data(klein: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    rows = [f'{{"file_name": "{n}.png", "text": "edit {n}", "control_path": "r{n}.png"}}\n' for n in range(2)]
    folder.mkdir()
    for name in ("0", "1", "r0", "r1"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text("".join(rows))
    pictures = init(folder, "--model", klein).previews.pictures()
    assert [(p.prompt, p.references) for p in pictures] == [
        (f"edit {n}", (str(folder / f"r{n}.png"),)) for n in range(2)
    ]


# The machine


def large(tmp_path: Path, size: tuple[int, int] = (1100, 1000)) -> Path:
    return pictures(tmp_path / "d", ["a cat"] * 4, size)


@pytest.mark.parametrize(
    ("gigabytes", "resolution", "said"),
    [
        (8, 1024, "bits: 8"),
        (10, 512, "bits: 16"),
        (24, 1024, "bits: 16"),
        (4, 512, " blocks in memory"),
    ],
)
def test_the_resolution_fits_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float, resolution: int, said: str
) -> None:
    machine(monkeypatch, gigabytes)
    config = init(large(tmp_path), "--model", "klein-base-4b")
    assert config.data[0].resolutions == (resolution,)
    assert config.model.path == "black-forest-labs/FLUX.2-klein-base-4B"
    assert said in Path("c.yaml").read_text()


def test_the_resolution_fits_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 64)
    assert init(large(tmp_path, (800, 800)), "--model", "klein-base-4b").data[0].resolutions == (768,)


def test_a_cpu_computes_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 64, is_gpu=False)
    config = init(large(tmp_path), "--model", "klein-base-4b")
    assert (config.train.dtype, config.memory.bits, config.encode.bits) == ("float32", 32, 32)
    assert config.data[0].resolutions == (512,)


def test_too_little_memory_for_anything_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0.5)
    refused(relay("init", large(tmp_path), "--model", "dev"), "no resolution", "0.5 GB", "--model")


def test_a_distilled_model_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 64)
    outcome = relay("init", large(tmp_path), "-o", "c.yaml", "--model", "klein-9b")
    assert "warning: it is distilled" in outcome.said
    assert "# name: klein-base-9b" in Path("c.yaml").read_text()
    assert load_config("c.yaml").previews.guidance == 1


def test_without_a_name_it_takes_what_the_cache_holds(
    klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 64)
    folder = large(tmp_path)
    outcome = relay("init", folder, "-o", "c.yaml")
    assert "hf download black-forest-labs/FLUX.2-klein-base-4B" in outcome.said
    for name in ("FLUX.2-klein-base-4B", "FLUX.2-klein-base-9B", "FLUX.2-klein-9B"):
        shutil.copytree(klein, tmp_path / f"hub/models--black-forest-labs--{name}/snapshots/1")
    assert init(folder, "--force").model.name == "klein-base-9b"
    machine(monkeypatch, 8)
    assert init(folder, "--force").model.name == "klein-base-4b"


def test_few_and_many_pictures_get_their_steps(klein: Path, tmp_path: Path) -> None:
    few = init(pictures(tmp_path / "few", ["a cat"]), "--model", klein)
    assert (few.train.steps, few.train.batch, few.save.every) == (500, 1, 100)
    many = init(pictures(tmp_path / "many", ["a cat"] * 100), "--model", klein, "--force")
    assert (many.train.steps, many.train.batch, many.validation.fraction) == (1250, 4, 0.05)


# The text


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn"]), max_size=40)
WHY = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(TEXT, max_size=3), lr=st.floats(1e-12, 1e9), why=WHY)
def test_any_value_survives_with_any_comment(texts: list[str], lr: float, why: str) -> None:
    why = " ".join(why.split())
    lines = [
        Line("model.path", "m", why),
        Line("data.0.path", "d", why),
        Line("data.0.background", "#ffffff", why),
        Line("train.lr", lr, why),
        Line("previews.prompts", texts, why),
        Line("previews.seed", 7, why, is_set=False),
    ]
    config = commented.checked(commented.document(["head"], lines), "c")
    assert (config.train.lr, config.previews.prompts, config.previews.seed) == (lr, tuple(texts), 42)


def test_what_it_prints_is_there_for_programs_and_a_path_with_a_space_is_quoted(klein: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "füchse im schnee", ["a red fox", "a fox"])
    outcome = relay("init", folder, "--model", klein, "-o", "my fox.yaml", "--json")
    told = json.loads(outcome.said)
    assert (told["config"], told["pictures"], told["next"]) == ("my fox.yaml", 2, "relay plan -c 'my fox.yaml'")
    assert told["memory"]["peak_bytes"] <= told["memory"]["budget_bytes"]
    assert "relay train -c 'my fox.yaml'" in Path("my fox.yaml").read_text()
    assert relay("plan", "-c", "my fox.yaml").status == 0
