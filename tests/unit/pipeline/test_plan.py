"""`relay plan`: what it says of store, memory, disk and time, and that it loads and makes nothing."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import model
from tiny.project import Outcome, Project

from flux2_relay.pipeline import plan, plan_text
from flux2_relay.stages import figures, identity
from flux2_relay.stages.encode import spill, stage, templates, text
from flux2_relay.stages.encode.forecast import TextPhase
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.train import loop

Make = Callable[..., Project]


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "load_text_encoder", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    monkeypatch.setattr(stage.vae, "load_encoder", lambda *_, **__: pytest.fail("the VAE was loaded"))
    monkeypatch.setattr(loop, "load_transformer", lambda *_, **__: pytest.fail("the transformer was loaded"))


@pytest.fixture(autouse=True)
def _memory_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))


@pytest.fixture
def own(encoded: Make, pictures: Path, tmp_path: Path) -> Project:
    """An encoded project whose pictures a test may change."""
    project: Project = encoded()
    project = Project(project.folder, project.model, shutil.copytree(pictures, tmp_path / "mine/pictures")).write()
    return project


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny encoder counts as large: too much to hash unasked."""
    monkeypatch.setattr(identity, "_SMALL", 100_000)


def told(project: Project, *arguments: object) -> dict:
    outcome = project.relay("plan", "--json", *arguments)
    assert outcome.status == 0, outcome.said
    return json.loads(outcome.said.splitlines()[-1])


def entries(project: Project, kind: str, *arguments: object) -> dict:
    return told(project, *arguments)["encoding"]["entries"][kind]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one_line(outcome: Outcome) -> str:
    """The text without its line breaks and columns."""
    return " ".join(outcome.said.split())


# The store


def test_without_a_store_everything_is_missing_and_nothing_is_made(
    dev: Path, pictures: Path, tmp_path: Path, no_models: None
) -> None:
    project = Project(tmp_path / "project", dev, pictures).write()
    outcome = project.relay("plan")
    assert outcome.status == 0, outcome.said
    assert listing(project.folder) == ["config.yaml"]
    said = one_line(outcome)
    assert f"{project.store} (does not exist yet)" in said
    assert "5 pictures with 5 captions 64 x 64: 3 80 x 48: 2" in said
    assert "captions: 9 wanted, 0 present, 9 missing" in said
    assert "pictures: 5 wanted, 0 present, 5 missing" in said
    assert said.endswith("next relay encode -c " + str(project.config))
    assert max(map(len, outcome.said.splitlines())) <= max(80, len(str(project.store)) + 40)


def test_a_complete_store(encoded: Make, no_models: None) -> None:
    project = encoded()
    before = listing(project.folder)
    outcome = project.relay("plan")
    assert outcome.status == 0, outcome.said
    said = one_line(outcome)
    assert "captions: 9 wanted, 9 present, 0 missing" in said
    assert "nothing to encode" in said
    assert said.endswith("next relay train -c " + str(project.config))
    assert listing(project.folder) == before


@pytest.mark.parametrize(
    ("changes", "kind", "count", "why"),
    [
        ({"encode": {"bits": 8}}, "text", 9, "quantization of the encoder (none, now bits 8 group 64 mode 'affine')"),
        ({"cache": {"latents_dtype": "float16"}}, "latents", 5, "type stored"),
        ({"data": {"resolutions": [48]}}, "latents", 5, "size resized to, crop"),
    ],
)
def test_a_changed_option_is_why_entries_are_stale(
    encoded: Make, changes: dict, kind: str, count: int, why: str
) -> None:
    project = encoded(**{key: value for key, value in changes.items()})
    found = entries(project, kind)
    assert found["missing"] == count
    (reason,) = found["stale"]
    assert why in reason
    assert found["stale"][reason] == count
    assert f"{count} stale: {why}" in one_line(project.relay("plan"))


def test_another_encoder_is_why_captions_are_stale(encoded: Make, tmp_path: Path) -> None:
    project = encoded(model={"text_encoder": str(model.write_dev(tmp_path / "other", seed=7) / "text_encoder")})
    assert entries(project, "text")["stale"] == {"text encoder weights": 9}


def test_another_template_is_why_captions_are_stale(encoded: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded()
    changed = dataclasses.replace(templates.FAMILIES["mistral"], after="[/INST] ")
    monkeypatch.setitem(templates.FAMILIES, "mistral", changed)  # pyright: ignore
    assert entries(project, "text")["stale"] == {"prompt template": 9}


def test_a_changed_caption_and_a_changed_picture_are_told_from_new_ones(own: Project) -> None:
    (own.data / "1.txt").write_text("a blue dog by the sea")
    Image.new("RGB", (64, 64), "red").save(own.data / "2.png")
    Image.new("RGB", (64, 64), "blue").save(own.data / "9.png")
    (own.data / "9.txt").write_text("a new picture")
    found = told(own)["encoding"]["entries"]
    assert (found["text"]["missing"], found["text"]["stale"]) == (2, {"caption changed": 1})
    assert (found["latents"]["missing"], found["latents"]["stale"]) == (2, {"picture changed": 1})


# The identity of large weights


def test_a_large_encoder_is_not_hashed_unasked(encoded: Make, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest = identity._tensor_digest
    monkeypatch.setattr(identity, "_tensor_digest", lambda info: hashed.append(info.name) or digest(info))
    project = encoded()
    outcome = project.relay("plan")
    assert outcome.status == 0, outcome.said
    said = one_line(outcome)
    assert "captions: 9 wanted, 9 of unknown identity, 9 of them there for some text encoder" in said
    assert "identity is unknown" in said
    assert "relay plan --hash" in said
    assert not [name for name in hashed if name.startswith("language_model")]
    outcome = project.relay("plan", "--hash")
    assert outcome.status == 0, outcome.said
    assert "hashing" in outcome.said
    assert "9 wanted, 9 present, 0 missing" in one_line(outcome)
    assert [name for name in hashed if name.startswith("language_model")]
    assert "9 wanted, 9 present" in one_line(project.relay("plan")), "once is enough"


def test_what_no_encoder_has_is_missing_for_certain(own: Project, large: None) -> None:
    (own.data / "1.txt").write_text("a blue dog by the sea")
    found = entries(own, "text")
    assert (found["unknown"], found["likely"], found["missing"]) == (9, 8, 1)


# Memory


def test_what_a_kill_can_lose_is_said(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "room_bytes", lambda: 0)  # else hidden states of one large pass would go to the disk
    encode = {"bits": 32, "stream": "always", "batch_tokens": 16}
    data = model.write_pictures(tmp_path / "data", 20)
    project = Project(tmp_path / "p", dev, data).write({"encode": encode, "memory": {"budget": 440_000}})
    captions = told_despite_faults(project)["encoding"]["captions"]
    assert captions["streamed"]
    assert captions["captions"] == 22
    assert 1 < captions["captions_a_pass"] < 22
    assert captions["passes"] == -(-22 // captions["captions_a_pass"])
    outcome = project.relay("plan")
    assert f"{captions['captions_a_pass']} caption" in outcome.said
    assert "what a kill can lose" in one_line(outcome)


def told_despite_faults(project: Project) -> dict:
    """As JSON, where the budget is too small for something."""
    outcome = project.relay("plan", "--json")
    return json.loads(next(line for line in outcome.said.splitlines() if line.startswith("{")))


def test_a_budget_that_is_too_small_is_a_fault_beside_all_else(encoded: Make) -> None:
    project = encoded(memory={"budget": 1000})
    outcome = project.relay("plan")
    assert outcome.status == 2
    said = one_line(outcome)
    assert "captions: 9 wanted, 9 present" in said
    assert "train: memory.budget: 1 kB is too little" in said
    assert "next see below" in said


def test_the_layout_is_the_one_that_training_takes(encoded: Make) -> None:
    project = encoded(train={"steps": 3}, previews={"every": 0}, memory={"stream": "always", "bits": 32})
    layout = told(project)["training"]["layout"]
    assert layout["resident"] == 0
    assert layout["peak_bytes"] == sum(layout["parts"].values())
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    assert layout["in_words"] in outcome.said


def test_encoding_says_what_was_predicted_beside_what_was_measured(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    planned = told(project)["encoding"]
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    for phase in ("captions", "images"):
        assert f"at the peak (predicted {in_words(planned[phase]['peak_bytes'])})" in outcome.said


# Time


def test_times_are_known_once_they_were_measured(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, pictures).write({"train": {"steps": 4}, "previews": {"every": 0}})
    first = told(project)
    assert first["encoding"]["captions"]["seconds"] is None
    assert first["encoding"]["images"]["seconds"] is None
    assert first["training"]["seconds"] is None
    assert "not known before the first run" in one_line(project.relay("plan"))
    assert project.relay("encode").status == 0
    assert project.relay("train").status == 0
    shutil.rmtree(project.store)
    shutil.rmtree(project.run)
    second = told(project)
    assert second["encoding"]["captions"]["seconds"] > 0
    assert second["encoding"]["images"]["seconds"] > 0
    assert second["training"]["seconds"] > 0
    assert "not known" not in project.relay("plan").said
    said = project.relay("encode").said
    for name, phase in (("text encoder", "captions"), ("VAE encoder", "images")):
        seconds = second["encoding"][phase]["seconds"]
        assert re.search(rf"{name} released after [\d.]+ s \(predicted {seconds:.1f} s\)", said), said


def test_a_figure_belongs_to_its_circumstances(monkeypatch: pytest.MonkeyPatch) -> None:
    figures.note("steps", {"bits": 8}, 10, 5)
    assert figures.recall("steps", {"bits": 8}) == figures.Figure(2.0, 5)
    assert figures.recall("steps", {"bits": 4}) is None
    assert figures.recall("pixels", {"bits": 8}) is None
    figures.note("steps", {"bits": 8}, 1, 0.1)
    assert figures.recall("steps", {"bits": 8}) == figures.Figure(2.0, 5), "a blink replaces no long measurement"
    figures.note("steps", {"bits": 8}, 30, 10)
    assert figures.recall("steps", {"bits": 8}) == figures.Figure(3.0, 10)
    monkeypatch.setattr(figures, "device", lambda: "another device")
    assert figures.recall("steps", {"bits": 8}) is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (89, "89 s"), (200, "3 min"), (5400, "1 h 30 min"), (86_400, "24 h 00 min")]
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert plan_text.in_time(seconds) == said


# The run, the disk


def test_a_run_under_way_is_gone_on_with(encoded: Make) -> None:
    project = encoded(previews={"every": 0})
    assert project.relay("train", "--max-steps", 2).status == 0
    assert told(project)["training"]["done"] == 2
    assert "6 steps, 2 are done" in one_line(project.relay("plan"))
    assert project.relay("train").status == 0
    assert "nothing is left to do" in project.relay("plan").said


def test_the_disk_that_will_not_do_is_named(dev: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    (disk,) = told(project)["disks"]
    assert disk["places"] == [str(project.store), str(project.run)]
    assert 0 < disk["free_bytes"] <= shutil.disk_usage(tmp_path).free - (1 << 30) + 10**9
    usage = shutil.disk_usage(tmp_path)._replace(free=(1 << 30) + 1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: usage)
    outcome = project.relay("plan")
    assert "1 kB are free beyond a reserve of 1 GiB: NOT ENOUGH" in one_line(outcome)


def test_what_the_store_takes_is_predicted(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    predicted = told(project)["disks"][0]["needed_bytes"] - told(project)["training"]["disk_bytes"]
    assert project.relay("encode").status == 0
    taken = sum(path.stat().st_blocks * 512 for path in project.store.rglob("*") if "KEY" not in path.name)
    assert 0.5 * taken < predicted < 1.6 * taken


# Machines that only train


@pytest.mark.parametrize("gone", ["data", "text_encoder"])
def test_a_training_machine_plans_its_training(encoded: Make, tmp_path: Path, gone: str) -> None:
    there = encoded()
    model = shutil.copytree(there.model, tmp_path / "other" / there.model.name)
    data = shutil.copytree(there.data, tmp_path / "other" / there.data.name)
    project = Project(there.folder, model, data).write()
    shutil.rmtree(data if gone == "data" else model / gone)
    outcome = project.relay("plan")
    assert outcome.status == 0, outcome.said
    assert "which lacks pictures or encoders" in one_line(outcome)
    assert told(project)["training"]["pictures"] == 5


def test_without_a_set_the_data_must_be_there(dev: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, tmp_path / "no data").write()
    outcome = project.relay("plan")
    assert outcome.status == 2
    assert str(tmp_path / "no data") in outcome.said


def test_masks_are_counted_where_there_are_any(dev: Path, pictures: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (64, 64), 255).save(masks / "0.png")
    project = Project(tmp_path / "p", dev, pictures).write({"data": {"masks": str(masks)}})
    found = told(project)["encoding"]
    assert found["entries"]["masks"]["wanted"] == 1
    assert any("4 of 5 pictures have no mask" in remark for remark in found["data"]["remarks"])
    assert "masks" not in told(Project(tmp_path / "q", dev, pictures).write())["encoding"]["entries"]


def test_a_pass_is_told_by_its_time_once_there_is_a_figure() -> None:
    phase = TextPhase(
        captions=20, tokens=1000, layout="streamed", streamed=True, passes=4, captions_a_pass=5,
        peak_bytes=10**9, seconds=400.0,
    )  # fmt: skip
    data = plan_text.Data(pictures=20, captions=20, buckets=(), remarks=())
    encoding = plan_text.Encoding(data=data, text_encoder="e", to_hash_bytes=0, entries={}, captions=phase, images=None)
    (line,) = plan_text._encode(encoding)
    assert "in 4 passes, 5 captions and about 2 min each: what a kill can lose at most" in line
