"""A small project as a user has one: a config, a data set, a store, runs; and `relay` in this process."""

import io
import json
import signal
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tiny import model

from flux2_relay.pipeline import cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, and all that it printed."""

    status: int
    said: str


def relay(*arguments: object) -> Outcome:
    """Run a command here; what is no plain sentence of the program comes through as the exception it is."""
    printed = io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        argv = mock.patch.object(sys, "argv", ["relay", *map(str, arguments)])
        with redirect_stdout(printed), redirect_stderr(printed), argv:
            cli.main()
    except SystemExit as leaving:
        return Outcome(int(leaving.code or 0), printed.getvalue())
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Outcome(0, printed.getvalue())


@dataclass(frozen=True)
class Project:
    """A folder with `config.yaml`; the model and the data may lie elsewhere."""

    folder: Path
    model: Path
    data: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "store.zarr"

    @property
    def run(self) -> Path:
        return self.folder / "runs/tiny"

    def write(self, changes: Mapping[str, Mapping[str, object]] | None = None) -> "Project":
        """Write the config, with changes to its sections."""
        self.folder.mkdir(parents=True, exist_ok=True)
        model.write_config(self.config, self.model, self.data, changes)
        return self

    def relay(self, command: str, *arguments: object) -> Outcome:
        """A command on this config."""
        return relay(command, "-c", self.config, *arguments)

    def metrics(self, *keys: str) -> list[list[Any]]:
        """These columns of the run's metrics."""
        lines = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return [[line[key] for key in keys] for line in lines]
