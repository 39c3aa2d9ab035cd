"""The last line of a stage: what was done, how long it took, the peak beside the plan, and the next command."""

import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field

import click

from flux2_relay.pipeline.report_metrics import duration
from flux2_relay.pipeline.run_folder import RunFolder, say
from flux2_relay.stages import one_model
from flux2_relay.stages.measure import in_words

WIDTH = 80


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of this process, from when this is made until it is closed."""

    run: RunFolder
    """Whose run it is: the turns of the stage's models are noted there."""

    planned_bytes: int | None = None
    """The peak that was planned, where the turns of its models do not say it."""
    others: tuple[RunFolder, ...] = ()
    """Runs beside it."""
    _started: float = field(default_factory=time.perf_counter)
    _before: int = field(default_factory=lambda: len(one_model.turns))

    def close(self, done: str, then: str) -> None:
        """Say it: `done` is what was done, `then` the next command."""
        said = f"{done} in {duration(time.perf_counter() - self._started)}"
        turns = one_model.turns[self._before :]
        for run in (self.run, *self.others):
            run.write_phases(asdict(turn) for turn in turns)
        if turns:
            largest = max(turns, key=lambda turn: turn.peak_bytes)
            planned = self.planned_bytes or largest.predicted_bytes
            said += f", peak {in_words(largest.peak_bytes)}"
            said += "" if planned is None else f" (planned {in_words(planned)})"
        say(joined(said, f"next: {then}"))


def joined(said: str, then: str) -> str:
    """Both on one line; on a terminal that is too narrow for it, on two."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    is_long = len(said) + len(then) + 2 > width
    return f"{said};\n{then}" if is_long and sys.stdout.isatty() else f"{said}; {then}"


def same_config(command: str) -> str:
    """`relay COMMAND` with the config and the settings of the command that runs now."""
    context = click.get_current_context(silent=True)
    given = context.params if context is not None else {}
    words = ["relay", command]
    files = given.get("config_files") or [file for file in (given.get("config_file"),) if file is not None]
    for option, values in (("-c", files), ("--set", given.get("settings", ())), ("--sweep", given.get("sweeps", ()))):
        for value in values:
            words += [option, str(value)]
    return shlex.join(words)
