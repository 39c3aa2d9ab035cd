"""Wrong configs, data sets, pictures and checkpoints: each is refused in plain words, and nothing is made or lost."""

import io
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny.project import Project
from wrong import (
    Case,
    after,
    check,
    config,
    contents,
    header,
    in_config,
    nothing,
    png_header,
    raw,
    run,
    text,
    truncated,
    weights,
)

E = "encode"
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklm"))
CONFIGS = [
    Case("an unknown section", E, in_config("lora:", "loar:"), ("unknown key 'loar'", "did you mean 'lora'")),
    Case("a key of another section", "train", in_config("rank: 2", "lr: 2"), ("'lora.lr'", "'train.lr'")),
    Case("a key twice", "train", in_config("  rank: 2", "  rank: 2\n  rank: 3"), ("duplicate key 'rank'",)),
    Case("no YAML", "plan", raw("model: [m"), ("config.yaml:1", "not YAML")),
    Case("a tab", "plan", raw("model:\n\tpath: m"), ("config.yaml:2", "not YAML")),
    Case("UTF-16", "plan", raw("model: {path: m}".encode("utf-16")), ("UTF-8",)),
    Case("nothing at all", E, raw(""), ("'model.path' is missing",)),
    Case("a list", E, raw("- model\n"), ("must be a mapping",)),
    Case("two documents", E, raw("a: 1\n---\nb: 2\n"), ("not YAML",)),
    Case("a number for a section", E, in_config("lora:\n", "lora: 3\nxx:\n"), ("'lora' must be a mapping",)),
    Case("a tower of brackets", "plan", raw("model: " + "[" * 400), ("not YAML",)),
    Case("a billion laughs", "plan", raw(LAUGHS), ("unknown key 'a'",)),
    Case("a control character", "plan", raw("model: {path: a\x07b}"), ("not YAML",)),
    Case("a learning rate in words", "train", config(train={"lr": "fast"}), ("'train.lr' must be a number",)),
    Case("a learning rate that is none", "train", config(train={"lr": float("nan")}), ("'train.lr'",)),
    Case("no rank", "train", config(lora={"rank": 0}), ("'lora.rank' must be at least 1",)),
    Case("half a picture", "train", config(train={"batch": 1.5}), ("'train.batch' must be a whole number",)),
    Case("no steps", "train", config(train={"steps": 0}), ("'train.steps' must be at least 1",)),
    Case("a name with a slash", "train", config(run={"name": "a/b"}), ("one folder",)),
    Case("a seed of 64 bits", "train", config(run={"seed": 2**40}), ("'run.seed' must be at most",)),
    Case("five bits", E, config(encode={"bits": 5}), ("'encode.bits' must be one of 32, 16, 8, 6, 4",)),
    Case("a budget in words", "train", config(memory={"budget": "lots"}), ("'memory.budget'", "24GB")),
    Case("a size that no token covers", E, config(previews={"size": [60, 64]}), ("a multiple of 16",)),
    Case("one prompt for a list", E, config(previews={"prompts": "fox"}), ("'previews.prompts' must be a list",)),
    Case("no data", E, raw("model: {path: m}\n"), ("names no folder",)),
    Case("a trigger with spaces around", E, config(data={"trigger": " a "}), ("'trigger'",)),
    Case("no colour", E, config(data={"background": "whitish"}), ("'background' must be a colour",)),
    Case("one resolution twice", E, config(data={"resolutions": [64, 64]}), ("'resolutions'", "once")),
    Case("a resolution of a few pixels", E, config(data={"resolutions": [8]}), ("at least 16",)),
    Case("no targets", "train", config(lora={"targets": []}), ("'targets' is an empty list",)),
    Case("a kind that there is not", "train", config(lora={"kind": "ia3"}), ("'lora.kind'", "ia3", "lokr")),
    Case("a reference that is not there", E,
         config(previews={"prompts": [{"prompt": "a", "references": ["none.png"]}]}), ("none.png",)),
    Case("a folder for a config", "encode -c {folder}", nothing, ("cannot read the config",)),
    Case("no config", "train -c {folder}/none.yaml", nothing, ("none.yaml", "No such file")),
    Case("a setting without a value", "plan --set lora.rank", nothing, ("--set lora.rank", "key.path=value")),
    Case("a setting of nothing known", "plan --set lora.rnak=3", nothing, ("--set lora.rnak=3", "lora.rank")),
    Case("a setting into a value", "plan --set lora.rank.x=3", nothing, ("--set", "single value")),
    Case("a setting behind a list's end", "plan --set previews.prompts.7=a", nothing, ("--set", "list of 1")),
    Case("an unknown command", "trian", nothing, ("trian",)),
    Case("an unknown option", "train --max-step 3", nothing, ("--max-step",)),
    Case("no steps at most", "train --max-steps 0", nothing, ("--max-steps",)),
]  # fmt: skip


def picture(name: str, mode: str = "RGB", size: tuple[int, int] = (64, 64), **how: str) -> Callable[[Project], None]:
    """A picture of the data set, saved like this."""

    def spoil(project: Project) -> None:
        Image.new(mode, size).save(project.data / name, **how)

    return spoil


def gone(*names: str) -> Callable[[Project], object]:
    """Files of the data set go."""
    return after(*(lambda project, name=name: (project.data / name).unlink() for name in names))


def animation(project: Project) -> None:
    frames = [Image.fromarray(np.full((64, 64, 3), n, np.uint8)) for n in (0, 255)]
    frames[0].save(project.data / "1.webp", save_all=True, append_images=frames[1:])
    (project.data / "1.png").unlink()


def floats(project: Project) -> None:
    Image.fromarray(np.zeros((64, 64), np.float32)).save(project.data / "1.tiff")
    (project.data / "1.png").unlink()


def cut_png(project: Project) -> None:
    (project.data / "2.png").write_bytes((project.data / "2.png").read_bytes()[:-2000])


def jpeg_of_noise() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (64, 64)).save(made, "JPEG")
    return made.getvalue()[:40]


ROW = '{"file_name": "1.png", "text": "another"}\n'
DATA = [
    Case("no folder", E, lambda p: shutil.rmtree(p.data), ("data.path", "does not exist")),
    Case("an empty folder", E, lambda p: [f.unlink() for f in p.data.iterdir()], ("holds no images",)),
    Case("a picture for a folder", E, config(data={"path": __file__}), ("neither a folder nor a .jsonl",)),
    Case("captions that are missing", E, gone("1.txt", "3.txt"), ("2 images", "1.png", "3.png", "1.txt")),
    Case("a caption in Latin-1", E, text("1.txt", b"caf\xe9"), ("1.txt", "UTF-8", "0xe9")),
    Case("a folder for a caption", E, after(gone("1.txt"), lambda p: (p.data / "1.txt").mkdir()), ("1.png",)),
    Case("a place for a trigger, and none", E, text("1.txt", "[trigger] runs"), ("[trigger]", "1.png")),
    Case("a listing with half a line", E, text("metadata.jsonl", '{"file_name": '), ("metadata.jsonl:1",)),
    Case("a listing of nothing here", E, text("metadata.jsonl", ROW.replace("1.png", "11.png")),
         ("there is no image 11.png", "did you mean")),
    Case("two captions for one picture", E, text("metadata.jsonl", ROW), ("1.png has one caption", "another in")),
    Case("a caption that is a number", E, text("metadata.jsonl", ROW.replace('"another"', "7")), ("no caption",)),
    Case("a listing that leads out", E, text("metadata.jsonl", ROW.replace("1.png", "../x.png")), ("leads out",)),
    Case("a list in captions.json", E, text("captions.json", "[1]"), ("captions.json", "JSON object")),
    Case("no JSON in captions.json", E, text("captions.json", "{"), ("captions.json", "JSON object")),
    Case("no folder of masks", E, config(data={"masks": "no-masks"}), ("data.masks", "not a folder")),
    Case("masks of other pictures", E,
         lambda p: (p.write({"data": {"masks": str(p.folder / "m")}}), (p.folder / "m").mkdir()),
         ("a mask for no picture",)),
    Case("masks among the pictures", E, picture("1-masklabel.png"), ("data.masks", "1-masklabel.png")),
    Case("references of none", E,
         lambda p: (p.write({"data": {"references": [str(p.folder / "r")]}}), (p.folder / "r").mkdir()),
         ("same base name",)),
    Case("a link to nothing", E, after(gone("1.png"), lambda p: (p.data / "1.png").symlink_to("gone")),
         ("dead link",)),
    Case("a type that is not read", E, after(gone("1.png"), text("1.heic", "x")), ("1.heic", "convert it to PNG")),
    Case("text for a picture", E, text("1.png", "GIF, or so"), ("1.png", "cannot be read as a picture")),
    Case("an empty picture", E, text("1.png", ""), ("1.png", "cannot be read as a picture")),
    Case("the beginning of a JPEG", E, text("1.png", jpeg_of_noise()), ("1.png", "cannot be read as a picture")),
    Case("a picture of a few pixels", E, picture("1.png", size=(8, 8)), ("8 x 8 pixels",)),
    Case("an animation", E, animation, ("1.webp", "2 frames")),
    Case("more pixels than anybody has", E, text("1.png", png_header(40000, 40000)), ("1.png", "pixels")),
    Case("a data set that init cannot use", "init {data} -o {folder}/new.yaml", gone("1.txt"), ("no caption",)),
]  # fmt: skip


def of_config(part: str, content: str) -> Callable[[Project], object]:
    """Another config.json of a part of the checkpoint."""
    return lambda project: (project.model / part / "config.json").write_text(content)


def missing_shard(project: Project) -> None:
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    (project.model / "text_encoder/model.safetensors.index.json").write_text(index)


CHECKPOINTS = [
    Case("no model", E, lambda p: shutil.rmtree(p.model), ("model.path", "no folder and no file")),
    Case("a repository that was never fetched", E, config(model={"path": "black-forest-labs/FLUX.2-dev"}),
         ("downloads nothing", "hf download")),
    Case("another model", E, config(model={"name": "dev"}), ("model.name is 'dev'", "2 + 2 blocks")),
    Case("no text encoder", E, lambda p: shutil.rmtree(p.model / "text_encoder"), ("text_encoder", "download")),
    Case("no VAE", E, lambda p: shutil.rmtree(p.model / "vae"), ("vae", "download")),
    Case("no tokenizer", E, lambda p: shutil.rmtree(p.model / "tokenizer"), ("tokenizer.json", "download")),
    Case("a tokenizer of nothing", E, lambda p: (p.model / "tokenizer/tokenizer.json").write_text("{}"),
         ("tokenizer.json",)),
    Case("half a config", E, of_config("transformer", "{"), ("transformer/config.json",)),
    Case("a config of another kind", E, of_config("vae", "[]"), ("vae/config.json",)),
    Case("a key that makes no sense", E, of_config("transformer", '{"num_layers": "many"}'), ("num_layers",)),
    Case("heads that do not divide", E, of_config("transformer", '{"axes_dims_rope": [3]}'), ("axes_dims_rope",)),
    Case("an encoder of another family", E, of_config("text_encoder", '{"text_config": {"model_type": "t5"}}'),
         ("text_encoder/config.json", "model_type", "t5")),
    Case("an encoder that was cut off", E, truncated("text_encoder"), ("text_encoder", "cut off")),
    Case("a VAE that was cut off", E, truncated("vae"), ("vae", "cut off")),
    Case("an empty file of weights", E, lambda p: weights(p, "vae").write_bytes(b""), ("vae", "cut off")),
    Case("a web page for weights", E, lambda p: weights(p, "vae").write_text("<html>" * 9), ("no safetensors",)),
    Case("a table of no tensors", E, header("vae", b'"shape"', b'"shapes"'), ("vae", "malformed")),
    Case("a type that nobody knows", E, header("vae", b'"F32"', b'"F31"'), ("unknown type F31",)),
    Case("numbers that are no weights", E, header("text_encoder", b'"F32"', b'"I32"'), ("type I32",)),
    Case("a tensor of another name", E, header("vae", b"encoder.conv_in.weight", b"encoder.conv_on.weight"),
         ("encoder.conv_in.weight is missing",)),
    Case("a shard that is not there", E, missing_shard, ("model-00001-of-00002.safetensors", "not there")),
    Case("a model without a name", "models --path=", nothing, ("--path", "name a folder")),
    Case("a folder to import", "import {folder}", nothing, ("is a folder", "name a file")),
    Case("a picture larger than any", "bench --resolution 100000", nothing, ("--resolution", "8192")),
    Case("no model to list", "models --path {folder}/none", nothing, ("none", "no folder and no file")),
]  # fmt: skip
ALL = [*CONFIGS, *DATA, *CHECKPOINTS]


@pytest.fixture
def fresh(dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Nothing encoded yet; model and data are the test's own."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model, data = shutil.copytree(dev, tmp_path / "model"), shutil.copytree(pictures, tmp_path / "data")
    return Project(tmp_path / "project", model, data).write()


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_it_is_refused_before_anything_is_made(case: Case, fresh: Project) -> None:
    before: dict[str, str] = {}
    spoilt = Case(case.name, case.command, lambda p: (case.spoil(p), before.update(contents(p.folder))), case.said)
    check(case, run(spoilt, fresh))
    assert contents(fresh.folder) == before


def test_the_table_is_long_and_names_no_case_twice() -> None:
    assert len({case.name for case in ALL}) == len(ALL) >= 60


def test_captions_and_pictures_that_are_wrong_are_named_at_once(fresh: Project) -> None:
    (fresh.data / "1.txt").write_bytes(b"caf\xe9")
    (fresh.data / "2.txt").unlink()
    (fresh.data / "3.png").write_bytes(b"")
    said = "1.txt", "0xe9", "2.png", "3.png", "cannot be read as a picture; the file is empty"
    check(Case("", E, nothing, said), fresh.relay("encode"))


def test_what_shows_on_decoding_is_collected_and_the_rest_is_kept(fresh: Project) -> None:
    cut_png(fresh)
    floats(fresh)
    outcome = fresh.relay("encode")
    said = "2.png", "cannot be read as a picture", "1.tiff", "32-bit numbers"
    check(Case("", E, nothing, said), outcome)
    assert len([name for name in os.listdir(fresh.store / "latents") if name != "zarr.json"]) == 3
    shutil.copy(fresh.data / "0.png", fresh.data / "2.png")
    shutil.copy(fresh.data / "0.png", fresh.data / "1.png")
    (fresh.data / "1.tiff").unlink()
    assert fresh.relay("encode").status == 0
