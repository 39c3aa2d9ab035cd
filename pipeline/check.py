"""`relay check`: whether the store holds what this transformer was trained on, and whether it can be trained.

From the store alone, like a training. What happens on the way goes to stderr with `--json`.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flux2_relay.pipeline import commands, labels
from flux2_relay.pipeline.cache_commands import print_json
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.run_folder import say

if TYPE_CHECKING:
    from flux2_relay.stages.train.acceptance import Finding

_VERDICTS = {
    "yes": "yes: this model can be trained on this store",
    "unsure": "yes, with doubts: see above",
    "no": "no: training would be in vain; see above",
}


@dataclass(frozen=True, slots=True)
class _Log:
    """A journal that keeps nothing and says what happens."""

    quiet: bool

    def write(self, line: Mapping[str, object]) -> None:
        """Metrics of a scratch run are nobody's."""

    def write_validation(self, line: Mapping[str, object]) -> None:
        """Nor are held-out losses."""

    def rewind(self, step: int) -> None:
        """Nothing was written."""

    def say(self, sentence: str) -> None:
        """Tell it, beside the answer where that is JSON."""
        click.echo(sentence, err=True) if self.quiet else say(sentence)


def run(config: Config, steps: int, as_json: bool, stop: Callable[[], bool]) -> bool:
    """Examine, train `steps` steps on trial, say what was found -> is the verdict other than no?"""
    from flux2_relay.stages.train import acceptance, trial

    given = commands.ready(config)
    log = _Log(quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="relay-check-") as scratch:
        job = replace(commands.train_job(config, given, Path(scratch)), stop=stop)
        findings = [*_look_at_template(given), *trial.examine(job, given.places, given.spec, log, steps)]
    verdict = acceptance.verdict(findings)
    if as_json:
        print_json({"verdict": verdict, "findings": list(map(asdict, findings))})
    else:
        _print(findings, verdict)
    return verdict != "no"


def _look_at_template(given: commands.Ready) -> "list[Finding]":
    """Whether the captions were put to the text encoder as its family was trained: no loss shows a small mistake there.

    A loss tells contexts that mislead; under half a template a good model is merely worse.
    """
    from flux2_relay.stages.encode.templates import FAMILIES
    from flux2_relay.stages.train.acceptance import Finding

    empty = given.store.header("text", given.record.body["shared"]["empty"])
    if empty.attributes["key"]["template"] in {template.identity() for template in FAMILIES.values()}:
        return []
    why = "these captions were put to the text encoder in a form that it was not trained with; run `relay encode` again"
    return [Finding("template", "no", why)]


def _print(findings: Sequence["Finding"], verdict: str) -> None:
    for finding in findings:
        labels.entry(finding.about, f"{finding.level}: {finding.sentence}")
    labels.entry("verdict", _VERDICTS[verdict])
