"""The numbers of a run as event files for TensorBoard, beside the run's own lines: `log.tensorboard`.

    runs/NAME/tensorboard/events.out.tfevents.…        tags loss, lr, grad_norm, held_out_loss

tensorboardX writes the files, without TensorFlow and without TensorBoard itself. Its writer of single events is used,
not its `SummaryWriter`: that one writes from a thread, and loses the last numbers where a process is killed.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.run_folder import RunFolder

if TYPE_CHECKING:
    from flux2_relay.stages.train.job import Journal

_OF_STEPS = {"loss": "loss", "lr": "lr", "grad_norm": "grad_norm"}
_OF_VALIDATION = {"loss": "held_out_loss"}


@contextmanager
def journal(run: RunFolder, tensorboard: bool) -> "Iterator[Journal]":
    """Where a run's lines go: its folder and, if asked for, event files; InputError where the extra is missing."""
    if not tensorboard:
        yield run
        return
    both = WithEvents(run)
    try:
        yield both
    finally:
        both.close()


class WithEvents:
    """A journal that keeps the run's lines in its folder and draws their numbers for TensorBoard, too."""

    def __init__(self, run: RunFolder) -> None:
        """Begins no file before `rewind` says from which step on."""
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:
            raise InputError(
                "log.tensorboard: true needs the extra of that name; run `pip install 'flux2-relay[tensorboard]'`"
            ) from None
        self._run, self._open, self._events, self._summaries = run, EventsWriter, event_pb2, summary_pb2
        self._file: EventsWriter | None = None

    def write(self, line: Mapping[str, object]) -> None:
        """Add one step's metrics."""
        self._run.write(line)
        self._draw(line, _OF_STEPS)

    def write_validation(self, line: Mapping[str, object]) -> None:
        """Add the held-out loss after a step."""
        self._run.write_validation(line)
        self._draw(line, _OF_VALIDATION)

    def rewind(self, step: int) -> None:
        """Forget later steps than `step`: a new file begins, which tells TensorBoard to drop them."""
        self._run.rewind(step)
        self.close()
        folder = self._run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._file = self._open(str(folder / "events"))
        started = self._events.SessionLog(status=self._events.SessionLog.START)
        self._put(step=step + 1 if step else 0, session_log=started)

    def say(self, sentence: str) -> None:
        """Tell the user something that happens once."""
        self._run.say(sentence)

    def close(self) -> None:
        """End the file, if one was begun."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _draw(self, line: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        values = [
            self._summaries.Summary.Value(tag=tag, simple_value=line[key])
            for key, tag in tags.items()
            if line[key] is not None  # a skipped step has no loss
        ]
        self._put(step=line["step"], summary=self._summaries.Summary(value=values))

    def _put(self, **fields: object) -> None:
        assert self._file is not None
        self._file.write_event(self._events.Event(wall_time=time.time(), **fields))
        self._file.flush()
