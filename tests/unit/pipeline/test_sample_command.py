"""`relay sample`: pictures with their settings in them, drawn once, from the store."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import adapters
from tiny.project import Outcome, Project

from flux2_relay import cache
from flux2_relay.cache.sets import needs
from flux2_relay.pipeline import apart, sampling, sampling_pictures
from flux2_relay.pipeline.sampling_pictures import Model, Scene
from flux2_relay.pipeline.wish import Wish
from flux2_relay.stages import spec
from flux2_relay.stages.encode import text
from flux2_relay.stages.train import drawing


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in this process: a fresh one takes a second or two to import what it needs."""
    monkeypatch.setattr(apart, "run", lambda work, *arguments: work(*arguments))


here = pytest.mark.usefixtures("_here")


@pytest.fixture
def project(dev: Path, pictures: Path, tmp_path: Path) -> Project:
    """Dev-like: guidance is an input."""
    return Project(tmp_path / "project", dev, pictures).write()


@pytest.fixture
def steered(klein: Path, pictures: Path, tmp_path: Path) -> Project:
    """Klein-like: guidance steers away from a negative prompt."""
    return Project(tmp_path / "steered", klein, pictures).write()


@pytest.fixture
def adapter(dev: Path, tmp_path: Path) -> Path:
    """Of every linear of the dev-like model."""
    of = spec.from_checkpoint(dev).transformer
    return adapters.write(tmp_path / "style.safetensors", adapters.factors(of, 2, seed=5))


def sample(project: Project, *arguments: object) -> Outcome:
    return project.relay("sample", "-o", project.folder / "out", *arguments)


def drawn(project: Project, *arguments: object) -> list[dict]:
    """The pictures that `--json` tells of."""
    outcome = sample(project, "--json", *arguments)
    assert outcome.status == 0, outcome.said
    (line,) = [line for line in outcome.said.splitlines() if line.startswith("{")]
    return json.loads(line)["pictures"]


def pixels(picture: dict) -> np.ndarray:
    with Image.open(picture["file"]) as image:
        return np.asarray(image.convert("RGB"))


def texts(picture: dict) -> dict:
    with Image.open(picture["file"]) as image:
        return dict(image.info)


def test_three_processes_draw_a_picture(project: Project, adapter: Path) -> None:
    """The whole way, each model in a process of its own."""
    outcome = sample(project, "--adapter", f"{adapter}=0.5", "--prompt", "a blue dog")
    assert outcome.status == 0, outcome.said
    assert "drew 1 picture, 0 were there" in outcome.said
    (file,) = (project.folder / "out").iterdir()
    assert file.name.startswith("a-blue-dog-42-x1-")
    assert pixels({"file": file}).shape == (64, 64, 3)


@here
def test_a_picture_says_how_it_was_made(project: Project, adapter: Path, dev: Path) -> None:
    (one,) = drawn(
        project, "--prompt", "ein Fuchs, größer; 狐", "--seed", 7, "--steps", 1, "--guidance", 2.5, "--size", "96x64",
        "--adapter", f"{adapter}=0.5", "--scale", 0.5,
    )  # fmt: skip
    told = texts(one)
    expected = {"prompt": "ein Fuchs, größer; 狐", "seed": "7", "steps": "1", "guidance": "2.5", "size": "96x64"}
    assert {name: told[name] for name in expected} == expected
    assert told["model"] == dev.name
    assert "negative" not in told
    (used,) = json.loads(told["adapters"])
    assert used == {"file": adapter.name, "sha256": used["sha256"], "scale": 0.25}
    assert len(used["sha256"]) == 64
    assert pixels(one).shape == (64, 96, 3)
    assert (one["seed"], one["steps"], one["guidance"], one["size"], one["scale"]) == (7, 1, 2.5, [96, 64], 0.5)
    assert one["adapters"] == [used]


@here
def test_a_contact_sheet_over_seeds_and_scales(project: Project, adapter: Path) -> None:
    found = drawn(
        project, "--prompt", "a blue dog", "--prompt", "a red fox", "--adapter", adapter,
        "--seed", 1, "--seed", 2, "--scale", 0, "--scale", 0.5, "--scale", 1,
    )  # fmt: skip
    assert len(found) == 12
    assert len({picture["file"] for picture in found}) == 12
    sheets = sorted((project.folder / "out").glob("sheet-*.png"))
    assert [sheet.name[:16] for sheet in sheets] == ["sheet-a-blue-dog", "sheet-a-red-fox-"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 3 * 256
        assert 2 * 256 < sheet.height < 3 * 256
    assert not (project.folder / "out/latents").exists()


@here
def test_scale_0_is_the_base_and_drawn_once(project: Project, adapter: Path) -> None:
    (base,) = drawn(project, "--prompt", "a blue dog")
    zero, full = drawn(project, "--prompt", "a blue dog", "--adapter", adapter, "--scale", 0, "--scale", 1)
    assert (zero["file"], zero["drawn"], zero["adapters"]) == (base["file"], False, [])
    assert full["drawn"]
    assert np.abs(pixels(full).astype(int) - pixels(base)).max() > 3


@here
def test_what_is_there_is_not_made_again(project: Project, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("--prompt", "a blue dog", "--adapter", adapter, "--seed", 1)
    (before,) = drawn(project, *wanted)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "load_transformer", lambda *_: pytest.fail("the transformer was loaded"))
        patch.setattr(text, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))
        (same,) = drawn(project, *wanted)
    assert same == {**before, "drawn": False}
    new = drawn(project, *wanted, "--seed", 2)
    assert [picture["drawn"] for picture in new] == [False, True]
    Path(before["file"]).write_bytes(b"another program's")
    assert [picture["drawn"] for picture in drawn(project, *wanted)] == [True]


@here
def test_latents_of_a_killed_command_are_only_decoded(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert sample(project, "--prompt", "a blue dog").status == 130
    assert len(list((project.folder / "out/latents").iterdir())) == 1
    monkeypatch.setattr(drawing, "load_transformer", lambda *_: pytest.fail("the transformer was loaded"))
    (one,) = drawn(project, "--prompt", "a blue dog")
    assert pixels(one).shape == (64, 64, 3)


WISH = Wish(folder=Path("out"), prompts=("a dog",))
MODEL = Model(name="tiny", transformer="t", decoder="d", bits=8, dtype="bfloat16")
KEYS = {"text": "k", "negative": "n", "references": []}


def key(adapter: Path, wish: Wish = WISH, model: Model = MODEL, keys: dict = KEYS, **changes: Any) -> str:
    """The key of the one picture of a scene with these changes."""
    plain = Scene(
        size=(64, 64), steps=4, guidance=3.0, is_steered=False, negative="", references=(), adapters=((adapter, 1.0),)
    )
    (one,) = sampling_pictures.pictures(wish, replace(plain, **changes), model, [keys], 42)
    return one.key


def test_another_setting_is_another_picture(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(adapter.read_bytes() + b" ")
    wishes = ({"seeds": (9,)}, {"scales": (0.5,)}, {"scales": (0.0,)})
    scenes: list[dict[str, Any]] = [
        {"size": (64, 80)},
        {"steps": 5},
        {"guidance": None},
        {"is_steered": True},
        {"adapters": ((other, 1.0),)},
        {"adapters": ((adapter, 1.0), (other, 1.0))},
    ]
    keys = [
        key(adapter),
        *(key(adapter, replace(WISH, **change)) for change in wishes),
        *(key(adapter, model=replace(MODEL, **{name: 4})) for name in ("transformer", "decoder", "bits", "dtype")),
        *(key(adapter, keys={**KEYS, **change}) for change in ({"text": "l"}, {"references": ["r"]})),
        *(key(adapter, **change) for change in scenes),
        key(adapter, is_steered=True, keys={**KEYS, "negative": "m"}),
    ]
    assert len(set(keys)) == len(keys)


def test_what_decides_no_pixel_is_no_part_of_the_key(adapter: Path, tmp_path: Path) -> None:
    """Names of files, a negative that is not read, and how two scales come to one strength."""
    renamed = Path(shutil.copy(adapter, tmp_path / "renamed.safetensors"))
    assert key(adapter) == key(adapter, adapters=((renamed, 1.0),)) == key(adapter, keys={**KEYS, "negative": "m"})
    assert key(adapter) == key(adapter, replace(WISH, scales=(2.0,)), adapters=((adapter, 0.5),))
    assert key(adapter, adapters=()) == key(adapter, adapters=((adapter, 0.0),))


@here
def test_a_negative_prompt_steers(steered: Project) -> None:
    wanted = ("--prompt", "a blue dog", "--guidance", 4)
    plain, other = (drawn(steered, *wanted, *more)[0] for more in ((), ("--negative", "a red fox")))
    assert np.abs(pixels(plain).astype(int) - pixels(other)).max() > 1
    assert (texts(plain)["negative"], texts(other)["negative"]) == ("", "a red fox")


@here
def test_references_are_encoded_and_seen(project: Project, pictures: Path) -> None:
    seen = drawn(project, "--prompt", "a blue dog", "--reference", pictures / "0.png")[0]
    two = drawn(
        project, "--prompt", "a blue dog", "--reference", pictures / "0.png", "--reference", pictures / "1.png"
    )[0]
    plain = drawn(project, "--prompt", "a blue dog")[0]
    assert json.loads(texts(two)["references"]) == ["0.png", "1.png"]
    assert np.abs(pixels(seen).astype(int) - pixels(plain)).max() > 1
    assert np.abs(pixels(seen).astype(int) - pixels(two)).max() > 1


@here
def test_prompts_of_the_training_are_taken_from_its_store(
    encoded: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its preview prompt is a context like any other; its set is left as it was."""
    project = encoded()
    monkeypatch.setattr(text, "load_text_encoder", lambda *_: pytest.fail("the text encoder was loaded"))
    drawn(project, "--prompt", "a blue dog")
    names = [record.name for record in cache.open(project.store).sets()]
    assert sorted(names) == ["tiny", "tiny-samples"]
    assert project.relay("train", "--max-steps", 1).status == 0


@here
def test_a_run_folder_is_its_adapter(encoded: Callable[..., Project]) -> None:
    project = encoded(train={"steps": 1}, previews={"every": 0})
    assert project.relay("train").status == 0
    (one,) = drawn(project, "--prompt", "a blue dog", "--adapter", project.run)
    assert [used["file"] for used in one["adapters"]] == ["adapter.safetensors"]


@here
def test_a_machine_without_the_encoder_draws_what_was_encoded(dev: Path, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev, tmp_path / "dev")
    project = Project(tmp_path / "project", folder, pictures).write()
    (first,) = drawn(project, "--prompt", "a blue dog")
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(project.folder / "out")
    (second,) = drawn(project, "--prompt", "a blue dog")
    assert second == first
    outcome = sample(project, "--prompt", "a red fox")
    assert outcome.status == 2
    assert "text_encoder" in outcome.said


@here
def test_the_store_keeps_what_was_encoded(project: Project) -> None:
    drawn(project, "--prompt", "a blue dog")
    store = cache.open(project.store)
    (record,) = store.sets()
    assert not store.missing(record)
    assert needs(record.body)["latents"] == []


REFUSED = {
    "no prompt": ((), "--prompt: nothing to draw"),
    "size": (("--prompt", "x", "--size", "70x64"), "multiples of 16; the nearest is 64x64"),
    "size in words": (("--prompt", "x", "--size", "large"), "WxH"),
    "scale alone": (("--prompt", "x", "--scale", "1"), "--scale: there is no adapter"),
    "no number": (("--prompt", "x", "--adapter", "a=b"), "'b' is no number"),
    "not finite": (("--prompt", "x", "--adapter", "a", "--scale", "nan"), "finite"),
    "no file": (("--prompt", "x", "--adapter", "gone.safetensors"), "gone.safetensors: no such file"),
    "no reference": (("--prompt", "x", "--reference", "gone.png"), "--reference gone.png: no such file"),
    "negative": (("--prompt", "x", "--negative", "y"), "--negative: this model is distilled"),
    "memory": (("--prompt", "x", "--set", "memory.budget=1KB"), "memory.budget: 1 kB is too little"),
}


@here
@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(project: Project, name: str) -> None:
    arguments, said = REFUSED[name]
    outcome = sample(project, *arguments)
    assert outcome.status == 2
    assert said in outcome.said
    assert "Traceback" not in outcome.said


@here
def test_faults_are_told_together(project: Project) -> None:
    outcome = sample(project, "--scale", "1", "--negative", "y")
    assert all(option in outcome.said for option in ("--prompt:", "--scale:", "--negative:"))


@here
def test_a_negative_without_guidance_is_refused(steered: Project) -> None:
    outcome = sample(steered, "--prompt", "x", "--negative", "y", "--guidance", 1)
    assert outcome.status == 2
    assert "--guidance above 1" in outcome.said


@here
def test_an_adapter_of_another_model_is_refused(project: Project, tmp_path: Path) -> None:
    of = spec.from_checkpoint(project.model).transformer
    values = adapters.factors(of, 2, seed=1, wanted=lambda path: path == "transformer_blocks.1.attn.to_q")
    ((a, b),) = values.values()
    file = adapters.write(tmp_path / "other.safetensors", {"transformer_blocks.9.attn.to_q": (a, b)})
    outcome = sample(project, "--prompt", "x", "--adapter", file)
    assert outcome.status == 2
    assert "is no LoRA for this model" in outcome.said
