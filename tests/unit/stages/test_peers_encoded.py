"""Data sets as four other trainers lay them out, side by side in one config, encoded as they are."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tiny.project import Project

from flux2_relay import cache


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(str(path.name))).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def ai_toolkit(folder: Path) -> dict:
    for name in ("img/a.png", "control/a.png", "mask/a.png"):
        picture(folder / name)
    (folder / "img/a.txt").write_text("[trigger] in blue")
    places = {"masks": str(folder / "mask"), "references": [str(folder / "control")]}
    return {"path": str(folder / "img"), "trigger": "zxy", "repeats": 2, "resolutions": [64, 32], **places}


def musubi(folder: Path) -> dict:
    row = {"image_path": str(picture(folder / "img/b.png")), "caption": "make it blue"}
    row["control_path"] = str(picture(folder / "ctl/b.png"))
    (folder / "list.jsonl").write_text(json.dumps(row))
    return {"path": str(folder / "list.jsonl"), "resolutions": [64]}


def mflux(folder: Path) -> dict:
    for side in ("in", "out"):
        picture(folder / f"01_{side}.png")
    (folder / "01_in.txt").write_text("make it red")
    return {"path": str(folder), "resolutions": [64]}


def diffsynth(folder: Path) -> dict:
    picture(folder / "c.png")
    (folder / "metadata.csv").write_text("image,prompt\nc.png,a red fox\n")
    return {"path": str(folder), "resolutions": [48], "flip": True, "prior": True}


def test_they_are_encoded_unchanged(dev: Path, tmp_path: Path) -> None:
    made = [make(tmp_path / make.__name__) for make in (ai_toolkit, musubi, mflux, diffsynth)]
    project = Project(tmp_path / "project", dev, tmp_path).write()
    config = yaml.safe_load(project.config.read_text())
    project.config.write_text(yaml.safe_dump({**config, "data": made}))
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    store = cache.open(project.store)
    (record,) = store.sets()
    assert store.missing(record) == {}
    samples = {sample["id"]: sample for sample in record.body["samples"]}
    captions = {
        name: [store.header("text", key).attributes["key"]["caption"] for key in sample["text"]]
        for name, sample in samples.items()
    }
    assert captions == {
        "0/a.png": ["zxy in blue"],
        "1/img/b.png": ["make it blue"],
        "2/01_out.png": ["make it red"],
        "3/c.png": ["a red fox"],
    }
    latents = {name: sample["latents"] for name, sample in samples.items()}
    assert {name: [(of["h"], of["w"]) for of in listed] for name, listed in latents.items()} == {
        "0/a.png": [(4, 4), (2, 2)],
        "1/img/b.png": [(4, 4)],
        "2/01_out.png": [(4, 4)],
        "3/c.png": [(3, 3), (3, 3)],
    }
    assert {name: [len(of["references"]) for of in listed] for name, listed in latents.items()} == {
        "0/a.png": [1, 1],
        "1/img/b.png": [1],
        "2/01_out.png": [1],
        "3/c.png": [0, 0],
    }
    assert [name for name, listed in latents.items() if listed[0]["mask"]] == ["0/a.png"]
    assert [(sample["repeats"], sample["prior"]) for sample in samples.values()] == [
        (2, False),
        (1, False),
        (1, False),
        (1, True),
    ]
    flips = [store.header("latents", of["key"]).attributes["key"]["flip"] for of in latents["3/c.png"]]
    assert flips == [False, True]
