"""Wrong stores, runs, adapters and disks, and signals: refused or survived in plain words, and nothing is lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny.project import Project, relay
from wrong import Case, check, config, contents, nothing, run

from flux2_relay.cache import durable
from flux2_relay.pipeline.signals import Terminated
from flux2_relay.stages.encode import stage

T = "train"


def version_99(project: Project) -> None:
    root = json.loads((project.store / "zarr.json").read_text())
    root["attributes"]["version"] = 99
    (project.store / "zarr.json").write_text(json.dumps(root))


def lose(kind: str) -> Callable[[Project], None]:
    """An entry of the store goes."""
    return lambda project: shutil.rmtree(next(path for path in entries(project, kind)))


def entries(project: Project, kind: str) -> Iterator[Path]:
    return (path for path in sorted((project.store / kind).iterdir()) if path.is_dir())


def flip(kind: str) -> Callable[[Project], None]:
    """A byte of every entry's chunk of a kind is another."""

    def spoil(project: Project) -> None:
        for entry in entries(project, kind):
            (chunk,) = (path for path in entry.rglob("*") if path.is_file() and path.name != "zarr.json")
            content = bytearray(chunk.read_bytes())
            content[-1] ^= 0xFF
            chunk.write_bytes(content)

    return spoil


def replaced(content: str) -> Callable[[Project], None]:
    """A file stands where the store should."""

    def spoil(project: Project) -> None:
        shutil.rmtree(project.store)
        project.store.write_text(content)

    return spoil


def emptied(project: Project) -> None:
    shutil.rmtree(project.store)
    project.store.mkdir()
    (project.store / "holiday.jpg").write_bytes(b"mine")


def a_file_for_runs(project: Project) -> None:
    (project.folder / "runs").write_text("mine")


def no_adapter(project: Project) -> None:
    (project.folder / "a.safetensors").write_text("<html>")
    project.write({"lora": {"init": str(project.folder / "a.safetensors")}})


def empty_run(project: Project) -> None:
    project.run.mkdir(parents=True)
    shutil.copy(project.config, project.run / "config.yaml")


def spoilt_run(project: Project) -> None:
    project.run.mkdir(parents=True)
    (project.run / "config.yaml").write_text("model: [")


PLACES = [
    Case("training before encoding", T, lambda p: shutil.rmtree(p.store), ("store.zarr", "relay encode")),
    Case("an entry that is missing", T, lose("latents"), ("1 of latents", "relay encode")),
    Case("a set that is missing", T, lose("sets"), ("store.zarr", "relay encode")),
    Case("a set of other bits", T, config(encode={"bits": 8}), ("encode.bits (32 there, 8 here)", "relay encode")),
    Case("a store of the future", T, version_99, ("version", "99")),
    Case("a store without its root", T, lambda p: (p.store / "zarr.json").unlink(), ("store.zarr",)),
    Case("half a root", T, lambda p: (p.store / "zarr.json").write_text("{"), ("store.zarr",)),
    Case("a root of something else", T, lambda p: (p.store / "zarr.json").write_text("[]"), ("store.zarr",)),
    Case("a file for a store", T, replaced("mine"), ("store.zarr",)),
    Case("another folder for a store", "encode", emptied, ("store.zarr",)),
    Case("latents with another byte", T, flip("latents"), ("latents", "damaged"), 2),
    Case("captions with another byte", T, flip("text"), ("text", "damaged"), 2),
    Case("a store in no known place", "cache ls --store ftp://x/y", nothing, ("ftp://x/y",)),
    Case("no store named", "cache stats", nothing, ("--store",)),
    Case("no store at all", "cache ls --store {folder}/none", nothing, ("none", "does not exist")),
    Case("a key of nothing", "cache show ffff --store {store}", nothing, ("ffff",)),
    Case("a key of everything", "cache show -c {config} 0zz", nothing, ("0zz",)),
    Case("a caption that was never encoded", "cache export -c {config} --caption cat -o {folder}/c.safetensors",
         nothing, ("cat",)),
    Case("a picture that was never encoded", "cache export -c {config} --image {config} -o {folder}/c.safetensors",
         nothing, ("config.yaml",)),
    Case("two things to export", "cache export -c {config} --caption a --key b -o c", nothing, ("one of --caption",)),
    Case("sets dropped by a wrong name", "cache gc -c {config} --drop nobody", nothing, ("nobody",)),
    Case("a copy from nowhere", "cache pull -c {config} {folder}/none", nothing, ("none",)),
    Case("no run to decode", "decode {folder}/runs/none", nothing, ("no run folder",)),
    Case("no run to report on", "report {folder}/runs/none", nothing, ("no run folder",)),
    Case("a run without previews", "decode {run}", empty_run, ("previews.prompts",)),
    Case("a run whose config is broken", "report {run}", spoilt_run, ("config.yaml:1", "not YAML")),
    Case("a file for the folder of runs", T, a_file_for_runs, ("runs", "run.dir")),
    Case("a run anew where one is", "train --resume never", empty_run, ("runs/tiny", "exists")),
    Case("a pattern that matches nothing", T, config(lora={"targets": ["to_qq"]}), ("lora.targets: 'to_qq'",)),
    Case("everything excluded", T, config(lora={"exclude": ["*"]}), ("leave no linear",)),
    Case("another rank for nothing", T, config(lora={"ranks": {"to_qq": 3}}), ("lora.ranks: 'to_qq'",)),
    Case("no adapter to start from", T, config(lora={"init": "none.safetensors"}), ("none.safetensors",)),
    Case("a web page to start from", T, no_adapter, ("a.safetensors", "no safetensors")),
    Case("too little memory", T, config(memory={"budget": "1kB"}), ("memory.budget", "the least that works")),
    Case("everything held out", T, config(validation={"fraction": 0.99}), ("validation.fraction",)),
]  # fmt: skip


@pytest.mark.parametrize("case", PLACES, ids=lambda case: case.name)
def test_it_is_refused_and_nothing_is_lost(
    case: Case, encoded: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    project = encoded()
    before: dict[str, str] = {}
    spoilt = Case(case.name, case.command, lambda p: (case.spoil(p), before.update(contents(p.folder))), case.said)
    check(case, run(spoilt, project))
    after = contents(project.folder)
    assert {path: after.get(path) for path in before} == before
    made = {path for path in set(after) - set(before) if not path.startswith(f"{project.run}/")}
    assert not made


def test_the_table_names_no_case_twice() -> None:
    assert len({case.name for case in PLACES}) == len(PLACES) >= 30


# Disks and permissions


def fails(number: int) -> Callable[..., None]:
    """What the operating system says when a disk is full or closed."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_does_not_take_an_entry(
    number: int, dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_and_sync", fails(number))
        outcome = project.relay("encode")
    check(Case("", "", nothing, (os.strerror(number),), outcome.status), outcome)
    assert outcome.status in (1, 2)
    assert project.relay("encode").status == 0


def test_a_folder_that_nobody_may_write_to(dev: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    project = Project(tmp_path / "p", dev, pictures).write({"cache": {"path": str(tmp_path / "file/store.zarr")}})
    check(Case("", "", nothing, ("file/store.zarr",)), project.relay("encode"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_caption_that_nobody_may_read(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, shutil.copytree(pictures, tmp_path / "d")).write()
    (project.data / "1.txt").chmod(0)
    check(Case("", "", nothing, ("1.txt", "permissions")), project.relay("encode"))


# Signals and a device that gives up


@pytest.mark.parametrize(("signal", "status"), [(KeyboardInterrupt(), 130), (Terminated(143), 143)])
def test_a_signal_in_the_middle_of_encoding(
    signal: BaseException, status: int, dev: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    real, done = stage.images.read_pixels, []

    def interrupted(*arguments: object, **options: object) -> object:
        done.append(1)
        if len(done) == 4:
            raise signal
        return real(*arguments, **options)  # pyright: ignore

    with monkeypatch.context() as patch:
        patch.setattr(stage.images, "read_pixels", interrupted)
        outcome = project.relay("encode")
    check(Case("", "", nothing, ("everything committed so far is kept", "goes on from there"), status), outcome)
    outcome = project.relay("encode")
    assert outcome.status == 0
    assert "encoded 0 captions" in outcome.said


GIVES_UP = {
    "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e)": "watchdog",
    "[METAL] Command buffer execution failed: Insufficient Memory": "memory",
    "[malloc] Unable to allocate 123 bytes.": "memory",
    "cudaErrorLaunchFailure": "driver",
}


@pytest.mark.parametrize("said", GIVES_UP)
def test_a_device_that_gives_up_in_training(said: str, encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from flux2_relay.stages.train import running

    project = encoded(previews={"every": 0, "prompts": ["a blue dog"]})
    real = running.gradients_of

    def broken(transformer: object, loaded: object, terms: object) -> object:
        if loaded.step == 3:  # pyright: ignore
            raise RuntimeError(said)
        return real(transformer, loaded, terms)  # pyright: ignore

    with monkeypatch.context() as patch:
        patch.setattr(running, "gradients_of", broken)
        outcome = project.relay("train")
    check(Case("", "", nothing, (GIVES_UP[said], "checkpoint of step 2"), 1), outcome)
    assert relay("train", "-c", project.config).status == 0
    assert len(project.metrics("step")) == 6
