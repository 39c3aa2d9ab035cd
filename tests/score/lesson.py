"""Runs of the lesson: the demo's own where it is there and current, otherwise one that is made; others with a fault."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from score.prompts import CONFIG, DATA, MODEL, PRIOR, ROOT, TRIGGER, captions
from score.studio import Studio

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import report, run_folder
from flux2_relay.pipeline.config import load_config

DEMO = ROOT / "runs/nano"
_FAULTS = Path(__file__).with_name("faults.py")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One run of `configs/nano.yaml`, with the settings that say where it lies."""

    run: Path
    settings: tuple[str, ...] = ()

    @property
    def adapter(self) -> Path:
        """What was learned."""
        return self.run / "adapter.safetensors"

    def loss(self) -> tuple[float, float]:
        """Mean of the first and of the last fifth of the steps."""
        return report.read_metrics(run_folder.RunFolder(self.run)).ends()

    def draw(self, trigger: str = TRIGGER) -> list[np.ndarray]:
        """The fifty captions with the trigger in front, or with nothing, drawn with the adapter."""
        studio = Studio(model=MODEL, adapter=self.adapter, options=load_config(CONFIG).lora)
        return studio.draw_on_two_cores([f"{trigger} {caption}".strip() for caption in captions()])

    def check(self) -> str:
        """The verdict of `relay check` on the run's store."""
        said = relay("none", "check", "-c", str(CONFIG), *self.settings, "--json")[1]
        return json.loads(said)["verdict"]


def demo() -> Lesson | None:
    """The run that `make demo` made, unless it is of other files than those that are here now."""
    try:
        _, config = run_folder.open_run(DEMO)
    except InputError:
        return None
    adapter = DEMO / "adapter.safetensors"
    if config != load_config(CONFIG) or not adapter.exists():
        return None
    sources = [path for folder in (MODEL, DATA, PRIOR) for path in folder.rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    return Lesson(run=DEMO) if adapter.stat().st_mtime > newest else None


def make(folder: Path, fault: str = "none") -> tuple[Lesson, dict[str, int]]:
    """All stages with a fault planted, previews in one step -> the run, and the peak of each process in bytes."""
    places = f"run.dir={folder}", f"run.name={fault}", f"cache.path={folder / fault}.zarr", "previews.steps=1"
    settings = tuple(word for place in places for word in ("--set", place))
    lesson = Lesson(run=folder / fault, settings=settings)
    config = ("-c", str(CONFIG), *settings)
    peaks = {command: relay(fault, command, *config)[0] for command in ("encode", "train")}
    return lesson, peaks | {"decode": relay(fault, "decode", str(lesson.run))[0]}


def relay(fault: str, *arguments: str) -> tuple[int, str]:
    """A command in a process of its own -> its peak in bytes, and what it printed."""
    line = [sys.executable, str(_FAULTS), fault, *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"relay {arguments[0]} with {fault} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return int(done.stderr.split()[-1]), done.stdout
