"""Stage one: what is encoded, what is not encoded again, and what happens to pictures that cannot be read."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from tiny.compare import assert_near
from tiny.project import Project

from flux2_relay import cache
from flux2_relay.cache import audit
from flux2_relay.stages import spec, vae
from flux2_relay.stages.encode import images, stage, text
from flux2_relay.stages.encode.text import load_text_encoder
from flux2_relay.stages.train.contexts import open_contexts


@pytest.fixture
def own(encoded: Callable[..., Project], pictures: Path, tmp_path: Path) -> Project:
    """An encoded project with a copy of the pictures, which a test may change."""
    project: Project = encoded()
    data = shutil.copytree(pictures, tmp_path / "pictures")
    project = Project(project.folder, project.model, data).write()
    assert project.relay("encode").status == 0
    return project


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails."""
    monkeypatch.setattr(text, "load_text_encoder", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    monkeypatch.setattr(stage.vae, "load_encoder", lambda *_, **__: pytest.fail("the VAE was loaded"))


def keys(project: Project) -> dict[str, set[str]]:
    store = cache.open(project.store)
    return {kind: store.keys(kind) for kind in ("text", "latents")}


def new(project: Project, before: dict[str, set[str]]) -> tuple[int, int]:
    """How many entries of text and of latents came in."""
    now = keys(project)
    assert all(before[kind] <= now[kind] for kind in now)
    return len(now["text"] - before["text"]), len(now["latents"] - before["latents"])


def test_the_set_lists_all_that_training_needs(encoded: Callable, dev: Path, pictures: Path) -> None:
    project = encoded()
    store = cache.open(project.store)
    (record,) = store.sets()
    assert store.missing(record) == {}
    assert [sample["id"] for sample in record.body["samples"]] == [f"{n}.png" for n in range(5)]
    assert [(s["latents"][0]["h"], s["latents"][0]["w"]) for s in record.body["samples"][:2]] == [(4, 4), (3, 5)]
    assert len(store.keys("latents")) == 5
    assert len(store.keys("text")) == 5 + 3 + 1  # captions; empty, prefix and pad; a preview's prompt
    assert set(record.body["shared"]) == {"empty", "prefix", "pad"}


def test_stored_entries_are_what_the_models_give(encoded: Callable, dev: Path, pictures: Path) -> None:
    store = cache.open(encoded().store)
    (record,) = store.sets()
    encoder = load_text_encoder(dev, spec.read_text_spec(dev / "text_encoder"), 32)
    expected = np.array(encoder.encode(["a red fox number 0", ""]))
    contexts = open_contexts(store, record.body, 192)
    sample = record.body["samples"][0]
    assert_near(np.array(contexts.context(sample["text"][0])), expected[0], 2e-6)
    assert_near(np.array(contexts.context(contexts.empty)), expected[1], 2e-6)
    pixels = np.array(Image.open(pictures / "0.png"), np.float32) / 127.5 - 1
    latents = vae.load_encoder(dev).encode(mx.array(pixels[None]))
    assert_near(store.read("latents", sample["latents"][0]["key"]).array[None], np.array(latents), 1e-5)


def test_a_second_run_makes_nothing_and_loads_no_model(own: Project, no_models: None) -> None:
    before = keys(own)
    outcome = own.relay("encode")
    assert outcome.status == 0, outcome.said
    assert "14 entries were there" in outcome.said
    assert "encoded 0 captions and 0 images in " in outcome.said
    assert new(own, before) == (0, 0)


def test_where_nothing_is_missing_nothing_slow_is_imported(own: Project) -> None:
    """mlx-lm brings transformers along, which take longer to import than ten thousand entries to look at."""
    code = """
import sys
from flux2_relay.pipeline import cli
for command in ("plan", "encode"):
    cli.main([command, "-c", sys.argv[1]])
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, own.config], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    *said, modules = done.stdout.splitlines()
    assert "encoded 0 captions and 0 images" in said[-1]
    assert not {"mlx_lm", "transformers", "torch"} & set(modules.split())
    assert "flux2_relay.stages.encode.stage" in modules.split()


def test_a_changed_caption_is_encoded_and_nothing_else(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.vae, "load_encoder", lambda *_, **__: pytest.fail("the VAE was loaded"))
    before = keys(own)
    (own.data / "3.txt").write_text("a blue dog at last")
    outcome = own.relay("encode")
    assert outcome.status == 0, outcome.said
    assert "encoded 1 captions and 0 images" in outcome.said
    assert new(own, before) == (1, 0)


def test_a_changed_picture_is_encoded_and_nothing_else(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "load_text_encoder", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    before = keys(own)
    Image.new("RGB", (64, 64), "red").save(own.data / "2.png")
    assert own.relay("encode").status == 0
    assert new(own, before) == (0, 1)


def test_a_caption_changed_back_is_trained_on_again(own: Project, no_models: None) -> None:
    (first,) = {record.key for record in cache.open(own.store).sets() if record.made["paths"] == [str(own.data)]}
    (own.data / "3.txt").write_text("a red fox number 1")  # another caption that is there already
    assert own.relay("encode").status == 0
    assert cache.open(own.store).sets()[0].key != first
    (own.data / "3.txt").write_text("a red fox number 3")
    assert own.relay("encode").status == 0
    assert cache.open(own.store).sets()[0].key == first


def test_what_another_process_has_done_meanwhile_is_not_done_again(
    encoded_store: Path, dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process is played by copies of its entries, which come while the first of ours is encoded."""
    project = Project(tmp_path / "p", dev, pictures).write({"encode": {"batch_tokens": 1}})
    read, run = images.read_pixels, text.TextEncoder._run

    def meanwhile(kind: str) -> None:
        for entry in (encoded_store / kind).iterdir():
            if entry.is_dir() and not (project.store / kind / entry.name).exists():
                shutil.copytree(entry, project.store / kind / entry.name)

    def pixels(*arguments):
        meanwhile("latents")
        return read(*arguments)

    def layers(*arguments):
        meanwhile("text")
        return run(*arguments)

    monkeypatch.setattr(images, "read_pixels", pixels)
    monkeypatch.setattr(text.TextEncoder, "_run", layers)
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    assert "encoded 1 captions and 1 images" in outcome.said


def test_a_lost_entry_is_made_again(own: Project) -> None:
    store = cache.open(own.store, "a")
    (lost,) = list(store.keys("latents"))[:1]
    before = store.read("latents", lost).array
    store.remove("latents", lost)
    outcome = own.relay("encode")
    assert "encoded 0 captions and 1 images" in outcome.said
    np.testing.assert_array_equal(cache.open(own.store).read("latents", lost).array, before)


def test_an_unreadable_picture_is_named_and_the_others_are_kept(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(own)
    whole = (own.data / "1.png").read_bytes()
    for number in (0, 1, 2):
        noise = np.random.default_rng(100 + number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(own.data / f"{number}.png")
    changed = (own.data / "1.png").read_bytes()
    (own.data / "1.png").write_bytes(changed[: len(changed) // 2])  # the header is whole: only decoding shows it
    outcome = own.relay("encode")
    assert outcome.status == 2
    assert str(own.data / "1.png") in outcome.said
    assert str(own.data / "2.png") not in outcome.said
    assert new(own, before) == (0, 2)
    assert own.relay("train").status == 2  # an entry is missing
    (own.data / "1.png").write_bytes(whole)  # encoded long ago
    monkeypatch.setattr(stage.vae, "load_encoder", lambda *_, **__: pytest.fail("the VAE was loaded"))
    assert own.relay("encode").status == 0
    assert new(own, before) == (0, 2)


def test_the_fixed_picture_alone_is_encoded(own: Project) -> None:
    whole = (own.data / "1.png").read_bytes()
    Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(own.data / "1.png")
    fixed = (own.data / "1.png").read_bytes()
    (own.data / "1.png").write_bytes(whole[: len(whole) // 2])
    assert own.relay("encode").status == 2
    (own.data / "1.png").write_bytes(fixed)
    outcome = own.relay("encode")
    assert outcome.status == 0
    assert "encoded 0 captions and 1 images" in outcome.said


@pytest.mark.parametrize("what", ["pictures", "masks"])
def test_a_file_that_changes_after_it_was_hashed_is_not_stored_under_its_old_hash(
    own: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Hours may lie between the two: what the file holds by then belongs under another key."""
    masks, module = tmp_path / "masks", {"pictures": images, "masks": stage.masks}[what]
    masks.mkdir()
    Image.new("RGB", (64, 64), "red").save(own.data / "1.png")
    for path in own.data.glob("*.png"):
        with Image.open(path) as picture:
            Image.new("L", picture.size, 99 if path.name == "1.png" else 128).save(masks / path.name)
    changed = {"pictures": own.data, "masks": masks}[what] / "1.png"
    read = {"pictures": "read_pixels", "masks": "read_mask"}[what]
    real = getattr(module, read)

    def late(path: Path, *rest: object) -> np.ndarray:
        if path.name == changed.name:
            Image.new("L", (64, 64), 77).save(changed)
        return real(path, *rest)

    project = own.write({"data": {"path": str(own.data), "masks": str(masks)}})
    with monkeypatch.context() as patch:
        patch.setattr(module, read, late)
        outcome = project.relay("encode")
    assert outcome.status == 2
    assert f"{changed}: was changed while this command ran; run it again" in outcome.said
    store = cache.open(own.store)
    missing = store.missing(store.sets()[0], patient=False)
    assert {kind: len(of) for kind, of in missing.items()} == {{"pictures": "latents", "masks": "masks"}[what]: 1}
    assert project.relay("encode").status == 0


def test_a_set_that_is_dropped_meanwhile_is_there_at_the_end(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (own.data / "1.txt").write_text("another caption")
    real = stage._encode_text

    def drop(job: stage.Job, *rest: Any) -> int:
        monkeypatch.setattr(stage, "_encode_text", real)
        audit.gc(job.store, now=0, keep=0)
        return real(job, *rest)

    monkeypatch.setattr(stage, "_encode_text", drop)
    outcome = own.relay("encode")
    assert outcome.status == 0, outcome.said
    store = cache.open(own.store)
    (record,) = store.sets()
    assert store.missing(record) == {}


def test_a_clock_that_is_behind_makes_the_newest_set(own: Project) -> None:
    """Its machine started with an empty battery; training takes the newest set that fits."""
    store = cache.open(own.store, "a")
    (old,) = store.sets()
    store.publish_set(old.body, {**old.made, "at": "2999-01-01T00:00:00+00:00"})
    (own.data / "1.txt").write_text("another caption")
    assert own.relay("encode").status == 0
    first, second = store.sets()
    assert first.body["request"] == second.body["request"]
    assert second.key == old.key


def test_a_picture_without_a_readable_header_stops_everything_early(own: Project, no_models: None) -> None:
    (own.data / "1.png").write_bytes(b"no picture")
    (own.data / "4.png").write_bytes(b"")
    outcome = own.relay("encode")
    assert outcome.status == 2
    assert str(own.data / "1.png") in outcome.said
    assert str(own.data / "4.png") in outcome.said


def test_the_text_encoder_is_gone_before_the_vae_comes(
    dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, int] = {}
    load_text, load_vae = text.load_text_encoder, vae.load_encoder

    def captions(*arguments, **named):
        held["before text"] = mx.get_active_memory()
        encoder = load_text(*arguments, **named)
        held["text"] = mx.get_active_memory()
        return encoder

    def images(*arguments, **named):
        held["before vae"] = mx.get_active_memory()
        return load_vae(*arguments, **named)

    monkeypatch.setattr(text, "load_text_encoder", captions)
    monkeypatch.setattr(stage.vae, "load_encoder", images)
    outcome = Project(tmp_path / "p", dev, pictures).write().relay("encode")
    assert outcome.status == 0, outcome.said
    assert held["text"] - held["before text"] > 300_000  # three layers
    assert held["before vae"] - held["before text"] < 50_000
    order = [outcome.said.index(f"{name}") for name in ("text encoder (", "text encoder released", "VAE encoder (")]
    assert order == sorted(order)


def test_entries_that_keep_vanishing_are_an_error(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    project = encoded()
    monkeypatch.setattr(stage, "_encode_text", lambda *_: 0)
    store = cache.open(project.store, "a")
    store.remove("text", next(iter(store.keys("text"))))
    outcome = project.relay("encode")
    assert outcome.status == 1
    assert "entries keep vanishing (1 of text)" in outcome.said


@pytest.mark.parametrize(
    ("section", "changes", "entries"),
    [
        ("data", {"flip": True}, (0, 5)),
        ("data", {"resolutions": [64, 32]}, (0, 5)),
        ("data", {"trigger": "zxy"}, (5, 0)),
        ("encode", {"bits": 16}, (9, 0)),
        ("cache", {"dtype": "bfloat16"}, (9, 0)),
        ("cache", {"latents_dtype": "float16"}, (0, 5)),
        ("previews", {"prompts": [{"prompt": "a blue dog", "negative": "grey"}]}, (1, 0)),
        ("previews", {"prompts": []}, (0, 0)),
        ("train", {"steps": 9}, (0, 0)),
        ("run", {"seed": 9}, (0, 0)),
    ],
)
def test_what_a_changed_option_encodes(
    encoded: Callable, section: str, changes: dict, entries: tuple[int, int]
) -> None:
    project = encoded()
    before = keys(project)
    project.write({section: changes})
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    assert new(project, before) == entries


def test_a_bar_of_tokens_for_captions_and_one_for_pictures(dev: Path, pictures: Path, tmp_path: Path) -> None:
    said = Project(tmp_path / "p", dev, pictures).write().relay("encode").said
    assert re.search(r"7 captions: 100%[^|]*\|[^|]*\| ([\d.]+)/\1 \[[\d:<]+, +[\d.k]+token/s\]", said), said
    assert re.search(r"images: 100%[^|]*\|[^|]*\| 5/5 \[[\d:<]+, +[\d.]+image/s\]", said), said


def test_klein_is_encoded_whole(klein: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", klein, pictures).write()
    outcome = project.relay("encode")
    assert outcome.status == 0, outcome.said
    store = cache.open(project.store)
    (record,) = store.sets()
    assert record.body["shared"]["prefix"] is record.body["shared"]["pad"] is None
    assert {store.read("text", key).array.shape for key in store.keys("text")} == {(48, 192)}
