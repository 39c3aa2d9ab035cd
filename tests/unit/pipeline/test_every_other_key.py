"""Every key that is not of training's sections changes what it should, too: `test_every_key.py` has those.

What stage one obeys is shown by what `relay encode` puts into a store beside what is there; the options of one preview
prompt by the latents that `relay train` draws.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from tiny import model
from tiny.project import Outcome, Project
from tokenizers import Tokenizer

from flux2_relay import cache
from flux2_relay.pipeline.config import CacheOptions, Config, ModelOptions, RunOptions, load_config
from flux2_relay.pipeline.request import find_set
from flux2_relay.stages.encode.dataset import DataOptions
from flux2_relay.stages.encode.options import EncodeOptions
from flux2_relay.stages.train.options import PromptOptions

SECTIONS = {"run": RunOptions, "model": ModelOptions, "data": DataOptions, "encode": EncodeOptions}
SECTIONS |= {"cache": CacheOptions}
OF_TRAINING = {"lora", "train", "memory", "validation", "save", "previews", "log"}  # `test_every_key.py`
ELSEWHERE = {"sweep"}  # `test_sweep.py`
Changes = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Made:
    """A project after `relay encode`, and the set that training would find."""

    project: Project
    outcome: Outcome

    @property
    def config(self) -> Config:
        return load_config(self.project.config)

    @property
    def store(self) -> cache.Store:
        return cache.open(self.config.cache.path)

    @property
    def samples(self) -> dict[str, dict[str, Any]]:
        return {sample["id"]: sample for sample in find_set(self.store, self.config).body["samples"]}

    def captions(self, name: str) -> list[str]:
        texts = self.samples[name]["text"]
        return [self.store.header("text", key).attributes["key"]["caption"] for key in texts]

    def latents(self, name: str, place: int = 0) -> np.ndarray:
        return self.store.read("latents", self.samples[name]["latents"][place]["key"]).array

    def text(self, name: str) -> np.ndarray:
        return self.store.read("text", self.samples[name]["text"][0]).array

    def kept_as(self, kind: str) -> tuple[str, bool]:
        """Type of a picture's entry of this kind, and whether it is compressed."""
        of = self.samples["tall.png"]
        key = of["text"][0] if kind == "text" else of["latents"][0]["key"]
        return self.store.header(kind, key).dtype, "zstd" in (self.store.path / kind / key / "zarr.json").read_text()

    def trained(self) -> list[str]:
        """Where the run of one step lies."""
        outcome = self.project.relay("train", "--max-steps", 1)
        assert outcome.status == 0, outcome.said
        folder = self.project.folder
        return [str(path.parent.relative_to(folder)) for path in folder.glob("*/*/metrics.jsonl")]

    def planned(self) -> dict[str, Any]:
        """What the plan says of the captions where nothing is encoded yet."""
        said = self.project.relay("plan", "--json", "--set", f"cache.path={self.project.folder}/none.zarr").said
        return json.loads(said[said.index("{") :])["encoding"]["captions"]


def other_pixels(a: Made, b: Made, *names: str) -> bool:
    """Whether just these pictures have other latents of the same size."""
    found = [
        name
        for name in a.samples
        if a.latents(name).shape != b.latents(name).shape or np.abs(a.latents(name) - b.latents(name)).max() > 1e-3
    ]
    return found == list(names) and all(a.latents(name).shape == b.latents(name).shape for name in names)


def other_text(a: Made, b: Made) -> bool:
    found = [(a.text(name), b.text(name)) for name in a.samples]
    return all(one.shape != other.shape or np.abs(one - other).max() > 1e-4 for one, other in found)


@dataclass(frozen=True)
class Key:
    """A changed value, what must hold of what is made without and with it, and what both have besides."""

    value: object
    holds: Callable[[Made, Made], bool]
    both: Changes = field(default_factory=dict)


KEYS = {
    "run.name": Key("other", lambda a, b: b.trained() == ["runs/other"]),
    "run.dir": Key("$/elsewhere", lambda a, b: b.trained() == ["elsewhere/tiny"]),
    "run.seed": Key(4, lambda a, b: other_pixels(a, b, "tall.png"), {"data": {"crop": "random"}}),
    "model.path": Key("@/other", lambda a, b: other_text(a, b) and other_pixels(a, b, "small.png", "tall.png")),
    "model.name": Key("klein-4b", lambda a, b: "model.name" in b.outcome.said),
    "model.text_encoder": Key("@/other/text_encoder", lambda a, b: other_text(a, b) and other_pixels(a, b)),
    "model.tokenizer": Key("@/swapped", lambda a, b: other_text(a, b) and other_pixels(a, b)),
    "model.vae": Key("@/other/vae", lambda a, b: not other_text(a, b) and other_pixels(a, b, "small.png", "tall.png")),
    "data.path": Key("@/others", lambda a, b: list(b.samples) == ["third.png"]),
    "data.captions": Key("lines", lambda a, b: b.captions("tall.png") == a.captions("tall.png")[0].split("\n")),
    "data.trigger": Key("zxy", lambda a, b: "zxy" in b.captions("tall.png")[0]),
    "data.repeats": Key(3, lambda a, b: [m.samples["tall.png"]["repeats"] for m in (a, b)] == [1, 3]),
    "data.resolutions": Key([32], lambda a, b: b.latents("tall.png").size < a.latents("tall.png").size),
    "data.upscale": Key(
        True,
        lambda a, b: (
            [m.latents("small.png").shape for m in (a, b)] == [(2, 2, 128), (4, 4, 128)]
            and np.array_equal(a.latents("tall.png"), b.latents("tall.png"))
        ),
    ),
    "data.crop": Key("top", lambda a, b: other_pixels(a, b, "tall.png")),
    "data.flip": Key(
        True,
        lambda a, b: (
            [len(m.samples["tall.png"]["latents"]) for m in (a, b)] == [1, 2]
            and np.abs(b.latents("tall.png", 0) - b.latents("tall.png", 1)).max() > 1e-3
        ),
    ),
    "data.background": Key("black", lambda a, b: other_pixels(a, b, "small.png")),
    "data.masks": Key("@/masks", lambda a, b: [_of_first(m, "mask") is None for m in (a, b)] == [True, False]),
    "data.references": Key(["@/before"], lambda a, b: [len(_of_first(m, "references")) for m in (a, b)] == [0, 1]),
    "data.prior": Key(True, lambda a, b: [m.samples["tall.png"]["prior"] for m in (a, b)] == [False, True]),
    "encode.bits": Key(16, other_text),
    "encode.stream": Key("always", lambda a, b: [m.planned()["streamed"] for m in (a, b)] == [False, True]),
    "encode.batch_tokens": Key(1, lambda a, b: a.planned()["peak_bytes"] > b.planned()["peak_bytes"]),
    "cache.path": Key("$/else.zarr", lambda a, b: (b.project.folder / "else.zarr").is_dir()),
    "cache.dtype": Key("bfloat16", lambda a, b: [m.kept_as("text")[0] for m in (a, b)] == ["float32", "bfloat16"]),
    "cache.latents_dtype": Key(
        "float16", lambda a, b: [m.kept_as("latents")[0] for m in (a, b)] == ["float32", "float16"]
    ),
    "cache.codec": Key("none", lambda a, b: [m.kept_as("text")[1] for m in (a, b)] == [True, False]),
}
REFUSED = ("model.name",)  # the checkpoint is no such model
EMPTY_STORE = ("cache.codec",)  # what is there already would stay as it is


def _of_first(made: Made, what: str) -> Any:
    return made.samples["tall.png"]["latents"][0][what]


def test_no_key_is_missing_here() -> None:
    assert set(KEYS) == {f"{section}.{of.name}" for section, kind in SECTIONS.items() for of in fields(kind)}
    assert {of.name for of in fields(Config)} == set(SECTIONS) | OF_TRAINING | ELSEWHERE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, dev: Path) -> Path:
    """A tall picture and a small one that is half transparent, with companions; models besides `dev`."""
    root = tmp_path_factory.mktemp("place")

    def save(name: str, size: tuple[int, int], channels: int = 3) -> None:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], channels), dtype=np.uint8)
        if channels == 4:
            pixels[..., 3] = 255 * (np.arange(size[0]) < size[0] // 2)
        Image.fromarray(pixels).save(path)

    save("data/tall.png", (48, 224))
    save("data/small.png", (32, 32), channels=4)
    save("others/third.png", (64, 64))
    for name in ("data/tall", "data/small", "others/third"):
        (root / f"{name}.txt").write_text("a red fox\na blue dog")
    for folder in ("masks", "before"):
        save(f"{folder}/tall.png", (48, 224))
        save(f"{folder}/small.png", (32, 32))
    model.write_dev(root / "other", seed=1)
    tokenizer = json.loads((dev / "tokenizer/tokenizer.json").read_text())
    one, other = Tokenizer.from_file(str(dev / "tokenizer/tokenizer.json")).encode("a red fox").tokens[-2:]
    numbers = tokenizer["model"]["vocab"]
    numbers[one], numbers[other] = numbers[other], numbers[one]
    (root / "swapped").mkdir()
    (root / "swapped/tokenizer.json").write_text(json.dumps(tokenizer))
    return root


@pytest.fixture(scope="module")
def known() -> dict[str, Made]:
    """What was made without a change, by what it has besides."""
    return {}


@pytest.fixture(scope="module")
def make(place: Path, dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Encode with these changes, into a copy of a store where there is one."""

    def made(changes: Changes, store: Path | None = None) -> Made:
        folder = tmp_path_factory.mktemp("project")
        paths = {"$": str(folder), "@": str(place)}

        def whole(value: object) -> object:
            if isinstance(value, list):
                return [whole(entry) for entry in value]
            return paths[value[0]] + value[1:] if isinstance(value, str) and value[:1] in paths else value

        changes = {section: {key: whole(value) for key, value in keys.items()} for section, keys in changes.items()}
        project = Project(folder, dev, place / "data").write(changes)
        if store is not None:
            shutil.copytree(store, project.store)
        return Made(project, project.relay("encode"))

    return made


@pytest.mark.parametrize("name", KEYS)
def test_the_key_changes_what_it_should(make: Callable[..., Made], known: dict[str, Made], name: str) -> None:
    key, (section, option) = KEYS[name], name.split(".")
    plain = {"data": {"resolutions": [64]}, "previews": {"every": 0, "prompts": []}}
    both = {of: {**plain.get(of, {}), **key.both.get(of, {})} for of in {*plain, *key.both}}
    before = known.get(repr(key.both)) or make(both)
    known[repr(key.both)] = before
    assert before.outcome.status == 0, before.outcome.said
    changed = {**both, section: {**both.get(section, {}), option: key.value}}
    after = make(changed, None if name in EMPTY_STORE else before.project.store)
    assert after.outcome.status == (2 if name in REFUSED else 0), after.outcome.said
    assert key.holds(before, after), after.outcome.said


# One preview prompt

PROMPT: Mapping[str, tuple[object, tuple[int, ...]]] = {
    "size": ([32, 96], (6, 2, 128)),
    "seed": (7, (4, 4, 128)),
    "steps": (3, (4, 4, 128)),
    "guidance": (2.0, (4, 4, 128)),
    "negative": ("a red fox", (4, 4, 128)),
    "references": (["0.png"], (4, 4, 128)),
}
"""A value, and the shape of the latents under it."""


@pytest.fixture(scope="module")
def steered(klein: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a project whose model takes a negative prompt."""
    project = Project(tmp_path_factory.mktemp("steered"), klein, pictures).write()
    assert project.relay("encode").status == 0
    return project.store


def drawn(project: Project, store: Path, pictures: Path, options: Mapping[str, object]) -> np.ndarray:
    """The preview of step 0 of a prompt with these options."""
    options = {key: [str(pictures / "0.png")] if key == "references" else value for key, value in options.items()}
    previews = {"every": 1, "prompts": [{"prompt": "a blue dog", **options}]}
    project.write({"previews": previews, "train": {"steps": 1}})
    shutil.copytree(store, project.store)
    for command in ("encode", "train"):
        outcome = project.relay(command)
        assert outcome.status == 0, outcome.said
    values = mx.load(str(project.run / "previews/000000-00.safetensors"))
    assert isinstance(values, dict)
    return np.array(values["latents"])


def test_no_option_of_a_prompt_is_missing_here() -> None:
    assert {"prompt", *PROMPT} == {of.name for of in fields(PromptOptions)}


@pytest.mark.parametrize("name", PROMPT)
def test_the_option_of_a_prompt_changes_its_picture(
    steered: Path, klein: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    value, shape = PROMPT[name]
    one, other = (Project(tmp_path / folder, klein, pictures) for folder in "ab")
    before, after = drawn(one, steered, pictures, {}), drawn(other, steered, pictures, {name: value})
    assert (before.shape, after.shape) == ((4, 4, 128), shape)
    assert before.shape != after.shape or np.abs(before - after).max() > 1e-3
