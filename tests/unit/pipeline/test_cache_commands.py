"""`relay cache`: each command on the store of a tiny project, as text and as JSON."""

import io
import json
import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import tqdm
from safetensors.numpy import load_file
from tiny import model, project

from flux2_relay import cache
from flux2_relay.cache import audit
from flux2_relay.pipeline import cache_commands
from flux2_relay.pipeline.place import Where
from flux2_relay.stages.context import assemble
from flux2_relay.stages.encode.claims import Claims
from flux2_relay.stages.train.contexts import to_mlx


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A project whose store is complete; tests change a copy of it."""
    folder = tmp_path_factory.mktemp("project")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "user")
    data = model.write_pictures(folder / "data", 3)
    made = project.Project(folder / "main", model.write_dev(folder / "model"), data)
    made.write({"cache": {"path": str(folder / "main/store.zarr")}})
    assert made.relay("encode").status == 0
    yield made
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def copied(encoded, tmp_path):
    shutil.copytree(encoded.store, tmp_path / "main/store.zarr")
    return project.Project(tmp_path / "main", encoded.model, encoded.data).write()


def _cache(place, command, *arguments):
    return project.relay("cache", command, "-c", place.config, *arguments)


def _json(place, command, *arguments):
    outcome = _cache(place, command, *arguments, "--json")
    assert outcome.status == 0, outcome.said
    return json.loads(outcome.said)


def _key(place, **parts):
    """The one text entry whose key has these parts."""
    store = cache.open(place.store)
    of = {key: store.header("text", key).attributes["key"] for key in store.keys("text")}
    (key,) = [key for key, key_object in of.items() if parts.items() <= key_object.items()]
    return key


def _damage(place, key):
    (place.store / "text" / key / "c.0.0").write_bytes(b"x")


def test_ls_names_every_set_and_entry(encoded):
    found = _json(encoded, "ls")
    store = cache.open(encoded.store)
    assert [(s["name"], s["missing"]) for s in found["sets"]] == [("tiny", 0)]
    assert {e["key"] for e in found["entries"]} == store.keys("text") | store.keys("latents")
    assert {e["of"] for e in found["entries"] if e["kind"] == "latents"} == {"0.png", "1.png", "2.png"}
    assert "'a red fox number 1'" in {e["of"] for e in found["entries"]}
    assert _json(encoded, "ls", "--kind", "latents")["sets"] == []
    text = _cache(encoded, "ls").said
    assert all(e["key"][:12] in text for e in found["entries"])
    by_path = project.relay("cache", "ls", "--store", encoded.store)
    assert by_path.said == text


def test_ls_shows_a_damaged_entry(copied):
    key = _key(copied, caption="a blue dog")
    (copied.store / "text" / key / "zarr.json").write_text("{")
    assert [e["key"] for e in _json(copied, "ls")["entries"] if e["dtype"] == "damaged"] == [key]


def test_show_says_a_key_in_words(encoded):
    key = _key(encoded, caption="a blue dog")
    said = _cache(encoded, "show", key[:6]).said
    for words in ("caption: 'a blue dog'", "type stored: 'float32'", "this config needs it", "version: "):
        assert words in said
    found = _json(encoded, "show", key)
    assert (found["key"], found["needed"], found["key_object"]["caption"]) == (key, True, "a blue dog")
    (of_set,) = cache.open(encoded.store).set_keys()
    assert found["sets"] == [of_set]
    assert "text: 7, 0 missing" in _cache(encoded, "show", of_set).said
    assert _json(encoded, "show", of_set)["body"]["name"] == "tiny"
    assert project.relay("cache", "show", "0123456789", "--store", encoded.store).status == 2


def test_show_says_why_an_entry_is_stale(encoded):
    key = _key(encoded, caption="a blue dog")
    said = _cache(encoded, "show", key, "--set", "cache.dtype=bfloat16").said
    assert "this config does not need it; what it needs instead differs in" in said
    assert "type stored: 'float32' there, 'bfloat16' wanted" in said
    found = _json(encoded, "show", key, "--set", "previews.prompts=[]")
    assert (found["needed"], found["differs"]) == (False, [])


def test_ls_stale_names_what_differs(encoded):
    assert "nothing is stale" in _cache(encoded, "ls", "--stale").said
    changes = ("--set", "cache.latents_dtype=float16", "--set", "previews.prompts=[something new]")
    stale = _json(encoded, "ls", "--stale", *changes)["stale"]
    latents = [s for s in stale if s["kind"] == "latents"]
    assert len(latents) == 3
    assert {tuple(s["differs"]) for s in latents} == {("type stored: 'float32' there, 'float16' wanted",)}
    assert {s["nearest"] for s in latents} == cache.open(encoded.store).keys("latents")
    assert [(s["of"], s["nearest"]) for s in stale if s["kind"] == "text"] == [("'something new'", None)]
    said = _cache(encoded, "ls", "--stale", *changes).said
    assert "3 of latents missing; the nearest entry differs in" in said
    assert "1 of text missing; nothing of the same caption" in said
    assert project.relay("cache", "ls", "--stale", "--store", encoded.store).status == 2


def test_stats_add_up(copied):
    copied.relay("encode", "--set", "run.name=other", "--set", "previews.prompts=[something new]")
    found = _json(copied, "stats")
    assert (found["kinds"]["text"]["entries"], found["kinds"]["latents"]["entries"]) == (8, 3)
    assert sorted(size["entries"] for size in found["own"].values()) == [1, 1]
    assert found["shared"]["entries"] == 9
    said = _cache(copied, "stats").said
    assert "shared by several sets: 9 entries" in said
    assert "in no set: nothing" in said
    assert "damaged: 0; in tmp: nothing" in said


def test_what_a_living_encoder_holds_is_not_said_to_be_dead(copied):
    with Claims(copied.store / "tmp/claims") as claims:
        claims.take(["a"])
        for command in ("stats", "verify"):
            said = _cache(copied, command).said
            assert "in tmp: 1 (being written, taken out of sight, or left by dead writers)" in said
        assert "0 left by dead writers" in _cache(copied, "gc").said
        assert Claims(copied.store / "tmp/claims").others(["a"]) == ["a"]


def test_verify_exits_with_1_for_damage_and_0_once_it_is_repaired(copied):
    assert _cache(copied, "verify").status == 0
    key = _key(copied, caption="a blue dog")
    _damage(copied, key)
    for arguments in ((), ("--quick",)):
        found = _cache(copied, "verify", *arguments)
        assert found.status == 1
        assert f"text/{key} is damaged" in found.said
        assert "relay cache verify --repair" in found.said
    as_json = _cache(copied, "verify", "--json")
    assert as_json.status == 1
    assert [fault["key"] for fault in json.loads(as_json.said)["faults"]] == [key]
    repaired = _cache(copied, "verify", "--repair")
    assert repaired.status == 0
    assert "1 damaged, 1 repaired" in repaired.said
    assert "lacks 1 entries" in _cache(copied, "verify").said
    assert copied.relay("encode").status == 0
    assert "lacks" not in _cache(copied, "verify").said


def test_training_on_a_damaged_entry_stops_with_its_key_and_the_repair_command(copied):
    _damage(copied, _key(copied, caption="a red fox number 0"))
    outcome = copied.relay("train", "--set", "train.caption_dropout=0.0", "--set", "previews.prompts=[a blue dog]")
    assert outcome.status == 2
    assert _key(copied, caption="a red fox number 0") in outcome.said
    assert "Run `relay cache verify --repair`, then `relay encode`" in outcome.said


def test_gc_drops_sets_and_what_only_they_named(copied):
    copied.relay("encode", "--set", "run.name=other", "--set", "previews.prompts=[something new]")
    kept, gone = _key(copied, caption="a blue dog"), _key(copied, caption="something new")
    dry = _json(copied, "gc", "--drop", "other", "--dry-run")
    assert (dry["entries"]["text"], [s["name"] for s in dry["sets"]]) == ([gone], ["other"])
    assert gone in cache.open(copied.store).keys("text")
    said = _cache(copied, "gc", "--drop", "other").said
    assert "deleted 1 sets, 1 of text" in said
    assert cache.open(copied.store).keys("text") >= {kept}
    assert gone not in cache.open(copied.store).keys("text")
    assert project.relay("cache", "gc", "--store", copied.store, "--drop", "nobody").status == 2
    assert _json(copied, "gc", "--keep", "0")["sets"] != []
    assert cache.open(copied.store).keys("text") == set()
    assert "holds nothing" in _cache(copied, "ls").said


def test_export_writes_a_context_whole(encoded, tmp_path):
    store = cache.open(encoded.store)
    assert _cache(encoded, "export", "--caption", "a blue dog", "-o", tmp_path / "c.safetensors").status == 0
    context = load_file(tmp_path / "c.safetensors")["context"]
    own, prefix, pad = (
        to_mlx(store.read("text", _key(encoded, **parts)))
        for parts in ({"caption": "a blue dog"}, {"rows": "prefix"}, {"rows": "pad"})
    )
    np.testing.assert_array_equal(context, np.array(assemble(own, prefix, pad, 48)), strict=True)


def test_export_writes_latents(encoded, tmp_path):
    image = encoded.data / "1.png"
    found = _json(encoded, "export", "--image", image, "-o", tmp_path / "l.safetensors")
    latents = load_file(tmp_path / "l.safetensors")["latents"]
    expected = cache.open(encoded.store).read("latents", found["key"]).array
    np.testing.assert_array_equal(latents, expected, strict=True)
    assert latents.shape == tuple(found["shape"])


def test_export_asks_which_when_a_picture_is_there_several_times(copied, tmp_path):
    copied.write({"data": {"path": str(copied.data), "resolutions": [64, 48], "flip": True}})
    assert copied.relay("encode").status == 0
    image, output = copied.data / "0.png", tmp_path / "l.safetensors"
    several = _cache(copied, "export", "--image", image, "-o", output)
    assert several.status == 2
    prefix = several.said.split("--key ")[1].split()[0]
    assert _json(copied, "export", "--key", prefix, "-o", output)["key"].startswith(prefix)
    copied.write({"data": {"path": str(copied.data), "resolutions": [64], "flip": True}})
    assert copied.relay("encode").status == 0
    store, key = cache.open(copied.store), _json(copied, "export", "--image", image, "-o", output)["key"]
    assert not store.header("latents", key).attributes["key"]["flip"]


def test_export_says_what_it_did_not_find(encoded, tmp_path):
    output = tmp_path / "x.safetensors"
    near = _cache(encoded, "export", "--caption", "a blue dogg", "-o", output)
    assert near.status == 2
    assert "the nearest one is 'a blue dog'" in near.said
    (tmp_path / "new.png").write_bytes(b"x")
    for arguments in (("--image", tmp_path / "new.png"), ("--image", tmp_path / "none.png"), (), ("--key", "zz")):
        assert _cache(encoded, "export", *arguments, "-o", output).status == 2
    assert not output.exists()


def test_a_caption_is_found_without_its_trigger_word(copied, tmp_path):
    copied.write({"data": {"path": str(copied.data), "resolutions": [64], "trigger": "sks"}})
    assert copied.relay("encode").status == 0
    found = _json(copied, "export", "--caption", "a red fox number 0", "-o", tmp_path / "c.safetensors")
    assert (
        cache.open(copied.store).header("text", found["key"]).attributes["key"]["caption"] == "sks a red fox number 0"
    )


def test_push_and_pull_between_folders(encoded, tmp_path):
    there = tmp_path / "there.zarr"
    found = _json(encoded, "push", there)
    assert (found["entries"], found["sets"], found["present"]) == (10, 1, 0)
    assert _json(encoded, "push", there)["entries"] == 0
    home = tmp_path / "home.zarr"
    outcome = project.relay("cache", "pull", there, "--store", home)
    assert "1 sets and 10 entries" in outcome.said
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (encoded.store, home)
    ]
    assert files[0] == files[1]
    chunk = next((there / "latents").glob("*/c.0.0.0"))
    chunk.write_bytes(b"x")
    assert project.relay("cache", "pull", there, "--store", tmp_path / "third.zarr").status == 1


def test_a_store_must_be_named(encoded, tmp_path):
    assert project.relay("cache", "stats").status == 2
    missing = project.relay("cache", "stats", "--store", tmp_path / "none")
    assert (missing.status, "does not exist" in missing.said) == (2, True)


def test_encode_deletes_what_dead_writers_left(copied, tmp_path):
    old, young = copied.store / "tmp/old", copied.store / "tmp/young"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    assert copied.relay("encode").status == 0
    assert young.exists()


@pytest.mark.parametrize("on_terminal", [True, False])
@pytest.mark.parametrize(("command", "says"), [("verify", "verifying"), ("stats", "reading"), ("gc", "collecting")])
def test_a_bar_shows_how_far_it_is_on_a_terminal(copied, monkeypatch, on_terminal, command, says):
    class Screen(io.StringIO):
        def isatty(self):
            return on_terminal

    screen, store = Screen(), cache.open(copied.store)
    if command == "gc":
        monkeypatch.setattr(audit, "_collect", lambda *_: True)
        monkeypatch.setattr(audit._Pins, "look", lambda self: set())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setattr(tqdm, "tqdm", partial(tqdm.tqdm, mininterval=0))  # nothing here takes the tenth of a second
        {
            "verify": lambda where: cache_commands.verify(where, False, False, True),
            "stats": lambda where: cache_commands.stats(where, True),
            "gc": lambda where: cache_commands.gc(where, (False, None, ()), True),
        }[command](Where(None, (), str(copied.store)))
    total = sum(len(store.keys(kind)) for kind in ("text", "latents", "masks")) + (command == "verify")
    shown = [line for line in screen.getvalue().split("\r") if says in line]
    assert bool(shown) == on_terminal
    assert any(f"/{total} " in line for line in shown) == on_terminal
