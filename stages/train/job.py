"""What stage two is given, and whom it tells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flux2_relay.cache import Store
from flux2_relay.cache.sets import SetRecord
from flux2_relay.stages.train.options import (
    LoraOptions,
    MemoryOptions,
    PreviewOptions,
    SaveOptions,
    TrainOptions,
    ValidationOptions,
)
from flux2_relay.stages.train.ranks import ALONE, Group


class Journal(Protocol):
    """Where a run's lines go."""

    def write(self, line: Mapping[str, object]) -> None:
        """Add one step's metrics."""
        ...

    def write_validation(self, line: Mapping[str, object]) -> None:
        """Add the held-out loss after a step."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what was written of later steps than `step`; at 0, everything."""
        ...

    def say(self, sentence: str) -> None:
        """Tell the user something that happens once."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to train, on what, and where to."""

    store: Store
    record: SetRecord
    folder: Path
    seed: int
    lora: LoraOptions
    train: TrainOptions
    validation: ValidationOptions
    save: SaveOptions
    previews: PreviewOptions
    memory: MemoryOptions
    distilled: bool
    metadata: Mapping[str, str]
    config: Mapping[str, object]  # key -> plain value of the whole config: told to checkpoints, not obeyed
    resume: bool
    max_steps: int | None  # stop after this many steps of this process
    stop: Callable[[], bool]  # asked after every step: leave now, with a checkpoint?
    group: Group = ALONE  # the processes that train this together

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"
