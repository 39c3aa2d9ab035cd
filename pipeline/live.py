"""The report while training goes on: RUN/report.html is written again at every preview, and reloads itself.

A journal around the run's own. It notices new previews by the date of their folder, so pictures that `relay decode`
makes beside the training appear too. No fault of the page stops a training.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.run_folder import RunFolder

if TYPE_CHECKING:
    from flux2_relay.stages.train.job import Journal

PATIENCE = 60.0
"""Seconds after which the page is written again although no preview has come."""


@contextmanager
def watched(journal: "Journal", run: RunFolder, config: Config) -> "Iterator[Watched]":
    """`journal`, with a page that is kept up to date; the last one is written when the training ends, however."""
    both = Watched(journal, run, config)
    try:
        yield both
    finally:
        both.write_page(live=False)


class Watched:
    """A journal that passes everything on and keeps the page of the run."""

    def __init__(self, journal: "Journal", run: RunFolder, config: Config) -> None:
        """Writes nothing yet."""
        self._journal, self._run, self._config = journal, run, config
        self._previews, self._written = 0, 0.0
        self._is_told = False

    def write(self, line: Mapping[str, object]) -> None:
        """Add one step's metrics."""
        self._journal.write(line)
        if self._date_of_previews() != self._previews or time.monotonic() - self._written > PATIENCE:
            self.write_page(live=True)

    def write_validation(self, line: Mapping[str, object]) -> None:
        """Add the held-out loss after a step."""
        self._journal.write_validation(line)

    def rewind(self, step: int) -> None:
        """Forget later steps than `step`, and show where the run begins."""
        self._journal.rewind(step)
        self.write_page(live=True)

    def say(self, sentence: str) -> None:
        """Tell the user something that happens once."""
        self._journal.say(sentence)

    def write_page(self, live: bool) -> None:
        """The page as of now; what goes wrong with it is said once."""
        from flux2_relay.pipeline.report import write_report

        self._previews, self._written = self._date_of_previews(), time.monotonic()
        try:
            write_report(self._run, self._config, live)
        except Exception as error:  # whatever it is: hours of training matter more than their picture
            if not self._is_told:
                self._journal.say(f"the report could not be written ({error}); training goes on")
            self._is_told = True

    def _date_of_previews(self) -> int:
        try:
            return (self._run.path / "previews").stat().st_mtime_ns
        except OSError:
            return 0
