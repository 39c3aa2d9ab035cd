"""The run folder: the resolved config, a line of metrics a step, and where everything else of a run lies.

config.yaml          as resolved        metrics.jsonl        a line a step
validation.jsonl     held-out losses    checkpoints/STEP/    to go on from
adapter.safetensors  for other programs, and adapter_ema.safetensors where there is a mean
previews/            latents and PNGs   report.html
phases.jsonl         a line for each model that a stage held: how long, and what memory it took and gave back
.save, .stop         made by the user: write a checkpoint, or write one and leave, after this step
.lock                held by the process that trains (`run_lock.py`)
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.config import Config, dump_config, load_config

PHASES = "phases.jsonl"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder; also the journal that stage two writes to."""

    path: Path
    label: str = ""
    """In front of what is printed, where runs share a terminal."""

    @property
    def metrics(self) -> Path:
        """The file with a JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter in diffusers names, written when a training ends."""
        return self.path / "adapter.safetensors"

    @property
    def validation(self) -> Path:
        """The file with a JSON object for each held-out loss."""
        return self.path / "validation.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def write(self, line: Mapping[str, object]) -> None:
        """Append one step's metrics."""
        _append(self.metrics, json.dumps(line))

    def write_validation(self, line: Mapping[str, object]) -> None:
        """Append the held-out loss after a step."""
        _append(self.validation, json.dumps(line))

    def write_phases(self, turns: Iterable[Mapping[str, object]]) -> None:
        """Append a line for each model that a stage has held; stage one does so before there is a run."""
        with suppress(OSError):  # it is for people to read, and no reason to fail
            for turn in turns:
                self.path.mkdir(parents=True, exist_ok=True)
                _append(self.path / PHASES, json.dumps(turn))

    def rewind(self, step: int) -> None:
        """Keep the lines up to `step` alone, at 0 none: what was done after the last checkpoint is done again."""
        for path in (self.metrics, self.validation):
            if path.exists():
                kept = [json.dumps(line) + "\n" for line in _lines(path) if step and line["step"] <= step]
                aside = path.with_suffix(".part")
                aside.write_text("".join(kept), "utf-8")
                os.replace(aside, path)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every whole line of metrics; one that a kill cut off ends the file."""
        return _lines(self.metrics)

    def validations(self) -> Iterator[dict[str, Any]]:
        """Every whole line of held-out losses, likewise."""
        return _lines(self.validation)

    def phases(self) -> Iterator[dict[str, Any]]:
        """Every whole line of what models took, likewise."""
        return _lines(self.path / PHASES)

    def say(self, sentence: str) -> None:
        """Print a sentence and keep it in the run's log."""
        say(self.label + sentence)
        self.note(sentence)

    def note(self, sentence: str) -> None:
        """Keep a sentence in the run's log."""
        with suppress(OSError):  # a full disk is no reason to stop; what matters of it is said elsewhere
            _append(self.path / "log.txt", sentence)


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                yield json.loads(text)
            except ValueError:
                return


def refuse_existing(folder: Path) -> None:
    """InputError where a run that may not be resumed has a folder already."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} == {PHASES}):
        raise InputError(
            f"{folder} exists already and --resume is never; choose another run.name, or let it resume (--resume auto)"
        )


def create(config: Config, label: str = "") -> RunFolder:
    """The folder of the run that `config` names, with the resolved config in it."""
    folder = RunFolder(config.run.folder, label)
    folder.path.mkdir(parents=True, exist_ok=True)
    aside = folder.path / "config.part"
    aside.write_text(dump_config(config), "utf-8")
    os.replace(aside, folder.path / "config.yaml")
    return folder


def open_run(path: Path) -> tuple[RunFolder, Config]:
    """An existing run folder and its config."""
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: is no run folder (it has no config.yaml); `relay train` makes one")
    return RunFolder(path), load_config(path / "config.yaml")


def say(sentence: str) -> None:
    """Print a sentence for the user without tearing a progress bar apart."""
    from tqdm import tqdm  # only here: `relay --help` needs none

    tqdm.write(sentence)
