"""Where a model's parts are looked for: folders, single files, the Hugging Face cache; and what is said of the rest."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import layouts

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import folders, hub, spec, vae
from flux2_relay.stages.encode.text import load_text_encoder
from flux2_relay.stages.train.transformer import load_transformer

REPOSITORY = "black-forest-labs/FLUX.2-dev"


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def download(
    source: Path, hub_folder: Path, repository: str = REPOSITORY, revision: str = "0a1b", ref: str = "main"
) -> Path:
    """Lay a folder into the cache as Hugging Face's tools do: blobs, and links to them."""
    folder = hub_folder / f"models--{repository.replace('/', '--')}"
    for number, file in enumerate(path for path in sorted(source.rglob("*")) if path.is_file()):
        blob = folder / "blobs" / f"{revision}{number}"
        link = folder / "snapshots" / revision / file.relative_to(source)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(revision)
    return folder / "snapshots" / revision


def test_a_folder_in_the_diffusers_layout(dev: Path) -> None:
    places = folders.find(str(dev))
    assert places == folders.ModelFolders(
        root=dev,
        transformer=dev / "transformer",
        text_encoder=dev / "text_encoder",
        tokenizer=dev / "tokenizer",
        vae=dev / "vae",
    )
    assert places.missing() == ()


def test_a_repository_in_the_hugging_face_cache(dev: Path, hf_home: Path) -> None:
    newest = download(dev, hf_home / "hub")
    download(dev / "vae", hf_home / "hub", revision="0ld", ref="")
    assert folders.find(REPOSITORY).root == newest
    assert spec.from_checkpoint(REPOSITORY) == spec.from_checkpoint(newest)
    assert load_transformer(REPOSITORY, spec.read_transformer_spec(newest / "transformer")).spec.double_blocks == 2


@pytest.mark.parametrize(
    ("name", "value", "folder"),
    [
        ("HF_HUB_CACHE", "a", "a"),
        ("HUGGINGFACE_HUB_CACHE", "b", "b"),
        ("HF_HOME", "c", "c/hub"),
        ("XDG_CACHE_HOME", "d", "d/huggingface/hub"),
    ],
)
def test_the_cache_is_where_hugging_face_keeps_it(
    hf_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, folder: str
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(name, str(tmp_path / value))
    assert hub.cache_folder() == tmp_path / folder


def test_a_download_of_one_revision_alone_is_found(dev: Path, hf_home: Path) -> None:
    pinned = download(dev / "vae", hf_home / "hub", ref="")
    assert hub.snapshot(REPOSITORY) == pinned
    download(dev / "vae", hf_home / "hub", revision="2c3d", ref="")
    assert hub.snapshot(REPOSITORY) is None, "which one is meant cannot be known"


def test_a_folder_here_goes_before_a_repository(
    dev: Path, hf_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(dev, hf_home / "hub", "models/dev")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dev, tmp_path / "models/dev")
    assert folders.find("models/dev").root == Path("models/dev")


def test_what_is_nowhere_says_where_it_was_looked_for(hf_home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"model.path: {REPOSITORY} is no folder.*hf download {REPOSITORY} --exclude flux2-d"
    ) as refused:
        folders.find(REPOSITORY)
    assert str(hf_home / "hub") in str(refused.value)
    with pytest.raises(InputError, match=r"model\.path: .*nowhere is no folder and no file"):
        folders.find(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"model\.vae: some/vae"):
        folders.find(str(tmp_path), vae="some/vae")


def single_files(dev: Path, folder: Path) -> Path:
    """The model as BFL's files beside each other, with folders for what has no single file; VAE config beside."""
    file = layouts.save(folder / "model.safetensors", layouts.bfl_transformer(layouts.load(dev / "transformer")))
    layouts.save(folder / "ae.safetensors", layouts.bfl_vae(layouts.load(dev / "vae")))
    shutil.copy(dev / "vae/config.json", folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(dev / part, folder / part)
    return file


@pytest.mark.parametrize("named", ["file", "folder"])
def test_single_files_beside_each_other_are_a_model(dev: Path, tmp_path: Path, named: str) -> None:
    file = single_files(dev, tmp_path / "x")
    root = file if named == "file" else file.parent
    places = folders.find(str(root))
    assert (places.transformer, places.vae) == (file, file.with_name("ae.safetensors"))
    assert places.missing() == ()
    found, expected = spec.from_checkpoint(root), spec.from_checkpoint(dev)
    assert (found.transformer, found.text, found.vae) == (expected.transformer, expected.text, expected.vae)
    assert not found.distilled
    captions = ["a red fox"]
    assert mx.array_equal(
        load_text_encoder(root, found.text, 32).encode(captions),
        load_text_encoder(dev, found.text, 32).encode(captions),
    )
    images = mx.array(np.random.default_rng(1).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32))
    latents = vae.load_encoder(root).encode(images)
    assert mx.array_equal(latents, vae.load_encoder(dev).encode(images))
    assert mx.array_equal(vae.load_decoder(root).decode(latents), vae.load_decoder(dev).decode(latents))
    assert set(load_transformer(root, found.transformer).outer) == set(load_transformer(dev, found.transformer).outer)


def test_a_file_in_a_distilled_models_folder_is_distilled(dev: Path, tmp_path: Path) -> None:
    file = single_files(dev, tmp_path / "x")
    (tmp_path / "x/model_index.json").write_text('{"is_distilled": true}')
    assert spec.read_distilled(file)
    assert spec.from_checkpoint(file).distilled


def test_each_part_may_be_named(dev: Path, klein: Path, hf_home: Path, tmp_path: Path) -> None:
    file = layouts.save(tmp_path / "t.safetensors", layouts.bfl_transformer(layouts.load(dev / "transformer")))
    encoder = download(klein / "text_encoder", hf_home / "hub", "someone/packed-encoder")
    places = folders.find(str(file), "someone/packed-encoder", str(dev / "tokenizer/tokenizer.json"), str(dev / "vae"))
    assert (places.transformer, places.text_encoder) == (file, encoder)
    assert (places.tokenizer, places.vae) == (dev / "tokenizer", dev / "vae")
    assert folders.find(str(file), vae=str(dev)).vae == dev / "vae", "another model's whole folder may be named"


def test_what_is_missing_is_told_by_part(dev: Path, tmp_path: Path) -> None:
    file = layouts.save(tmp_path / "t.safetensors", layouts.bfl_transformer(layouts.load(dev / "transformer")))
    assert folders.find(str(file)).missing() == ("text_encoder", "tokenizer", "vae")
    with pytest.raises(InputError) as refused:
        folders.require(folders.find(str(file)), ("text_encoder", "tokenizer", "vae"), "dev")
    for said in (
        "hf download black-forest-labs/FLUX.2-dev --include 'text_encoder/*'",
        "mistral_3_small_flux2_bf16.safetensors",
        "tokenizer/tokenizer.json of black-forest-labs/FLUX.2-dev",
        "ae.safetensors",
        str(tmp_path / "vae"),
    ):
        assert said in str(refused.value)
    folders.require(folders.find(str(file)), ("transformer",), None)


def test_two_files_of_one_part_must_be_told_apart(dev: Path, tmp_path: Path) -> None:
    file = single_files(dev, tmp_path / "x")
    shutil.copy(file.with_name("ae.safetensors"), file.with_name("other.safetensors"))
    with pytest.raises(InputError, match=r"several files hold a vae.*\n  ae\.safetensors\n  other\.safetensors"):
        folders.find(str(file))
    assert folders.find(str(file), vae=str(file.with_name("other.safetensors"))).vae.name == "other.safetensors"
