"""The whole acceptance test: the transformer loaded, the base examined, and a training on trial in a scratch folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median

import mlx.core as mx
from tqdm import tqdm

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.one_model import in_turn
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import acceptance, loop, lora, objective, validation
from flux2_relay.stages.train.acceptance import Chosen, Examiner, Finding
from flux2_relay.stages.train.contexts import open_contexts
from flux2_relay.stages.train.job import Job, Journal
from flux2_relay.stages.train.layout import Layout
from flux2_relay.stages.train.options import ValidationOptions
from flux2_relay.stages.train.transformer import stock_of

_HELD_OUT = 0.1  # of the data set, where the config holds out nothing
_VALIDATIONS = 10
_RISEN, _FAR_RISEN = 1.02, 1.05  # held-out loss at the end over that before the first step
_SPREAD = (0.5, 2.0)  # of predicted pictures, after over before: less is grey, more is burnt
_FAR_SPREAD = (0.25, 4.0)
_SPREAD_SIGMA = 0.9
_GROWN = 1.5  # loss of the last tenth of the steps over that of the first


@dataclass(slots=True)
class Heard:
    """A journal that keeps everything in memory."""

    say_on: Journal
    steps: list[Mapping[str, object]] = field(default_factory=list)
    held_out: list[Mapping[str, object]] = field(default_factory=list)

    def write(self, line: Mapping[str, object]) -> None:
        """Keep one step's metrics."""
        self.steps.append(line)

    def write_validation(self, line: Mapping[str, object]) -> None:
        """Keep a held-out loss."""
        self.held_out.append(line)

    def rewind(self, step: int) -> None:
        """Nothing was written before."""

    def say(self, sentence: str) -> None:
        """Pass on what happens once."""
        self.say_on.say(sentence)


def examine(job: Job, folders: ModelFolders, spec: TransformerSpec, journal: Journal, steps: int) -> list[Finding]:
    """Load the transformer, look at store and base, train `steps` steps into `job.folder`, let go of it."""
    layout = loop.layout_of(job, spec, stock_of(folders.transformer, spec))
    journal.say(f"memory: {layout.in_words()}")
    work = partial(_examine, job, folders, spec, layout, journal)
    return in_turn("transformer", partial(work, steps), journal.say, layout.peak_bytes if steps else None)


def _examine(
    job: Job, folders: ModelFolders, spec: TransformerSpec, layout: Layout, journal: Journal, steps: int
) -> list[Finding]:
    transformer = loop.load(job, folders, spec, layout, journal.say)
    contexts = open_contexts(job.store, job.record.body, spec.context_width)
    chosen = Chosen(job.record.body, acceptance.ITEMS)
    if not chosen.items:
        raise InputError("the set holds no pictures; give the config a `data` section and run `relay encode`")
    try:
        with tqdm(desc="check", unit="pass", dynamic_ncols=True, leave=False, disable=None) as bar:
            examiner = Examiner(transformer, chosen, contexts, job.train.guidance, bar.update)
            findings = acceptance.look_at_store(contexts, chosen, spec.context_width)
            losses = examiner.losses(acceptance.SIGMAS)
            findings.append(acceptance.judge(losses, examiner.diagnose))
            if findings[-1].level != "no":  # a model that predicts nothing has no use for captions
                findings.append(examiner.look_at_captions())
        if steps and acceptance.verdict(findings) == "no":
            journal.say("no training on trial: the verdict is no already")
        elif steps:
            findings += try_training(job, examiner, journal, steps)
    finally:
        transformer.residence.close()
    return findings


def try_training(job: Job, examiner: Examiner, journal: Journal, steps: int) -> list[Finding]:
    """Train the examiner's transformer for `steps` steps and judge how that went."""
    heard, before = Heard(journal), spread(examiner)
    trial = replace(
        job,
        train=replace(job.train, steps=steps, warmup=min(job.train.warmup, steps // 10)),
        validation=ValidationOptions(fraction=_fraction(job), every=max(1, steps // _VALIDATIONS)),
        save=replace(job.save, every=steps, keep=1),
        previews=replace(job.previews, every=0),
        resume=False,
        max_steps=None,
    )
    try:
        loop.train(trial, examiner.transformer, heard)
    except RelayError as error:
        return [Finding("training", "no", str(error))]
    values = lora.parameters(examiner.transformer)
    return [
        judge_steps([line["loss"] for line in heard.steps]),
        judge_held_out([line["loss"] for line in heard.held_out]),
        judge_adapter({name: float(mx.max(mx.abs(b))) for name, b in values.items() if lora.starts_at_zero(name)}),
        judge_spread(before, spread(examiner)),
    ]


def _fraction(job: Job) -> float:
    """The share held out; nothing where that would leave nothing to train on."""
    fraction = job.validation.fraction or _HELD_OUT
    try:
        validation.split(job.record.body, fraction)
    except InputError:
        return 0.0
    return fraction


def spread(examiner: Examiner) -> float:
    """The standard deviation of the pictures that the model sees in almost pure noise, mean over the chosen ones."""
    found = []
    for item, batch in zip(examiner.chosen.items, examiner.chosen.batches(examiner.contexts), strict=True):
        noise = examiner.noise(item, _SPREAD_SIGMA, batch.latents.shape)
        at = mx.full((1,), _SPREAD_SIGMA)
        velocity = examiner.velocity(batch, _SPREAD_SIGMA, noise)
        seen = objective.add_noise(batch.latents, noise, at) - _SPREAD_SIGMA * velocity
        found.append(float(mx.std(seen)))
    return fmean(found)


def judge_steps(losses: Sequence[object]) -> Finding:
    """Whether the losses of the steps are finite and do not grow."""
    finite = [loss for loss in losses if isinstance(loss, float)]
    skipped = len(losses) - len(finite)
    if not finite:
        return Finding("training", "no", f"no step of {len(losses)} had a finite loss")
    tenth = max(1, len(finite) // 10)
    first, last = median(finite[:tenth]), median(finite[-tenth:])
    said = f"{len(losses)} steps, loss {first:.3f} at first and {last:.3f} at last (medians of a tenth)"
    if skipped:
        return Finding("training", "no", f"{said}; {skipped} were skipped, their loss or gradient not being finite")
    if len(finite) >= 50 and last > _GROWN * first:  # single steps vary more than twofold with sigma
        return Finding("training", "no", f"{said}; it grows: a lower train.lr is the usual remedy")
    return Finding("training", "yes", said)


def judge_held_out(losses: Sequence[object]) -> Finding:
    """Whether the held-out loss at fixed sigmas rises; the first one is that of the untrained adapter."""
    finite = [loss for loss in losses if isinstance(loss, float)]
    if len(losses) < 2:
        return Finding("held out", "unsure", "too few pictures to hold any out")
    if len(finite) < len(losses):
        return Finding("held out", "no", "the held-out loss is not finite")
    first, last, best = finite[0], finite[-1], min(finite[1:])
    said = f"held-out loss at fixed sigmas {first:.4f} before and {last:.4f} after, {best:.4f} at best"
    if last <= _RISEN * first:
        return Finding("held out", "yes", said)
    if best < first or last <= _FAR_RISEN * first:
        return Finding("held out", "unsure", f"{said}: these pictures are learned by heart; fewer steps will do")
    return Finding("held out", "no", f"{said}: it rises; a lower train.lr is the usual remedy")


def judge_adapter(largest: Mapping[str, float]) -> Finding:
    """Whether the adapter was trained; `largest` has the largest value of each B, which starts as zero."""
    zero = [name for name, value in largest.items() if value == 0]
    if any(not math.isfinite(value) for value in largest.values()):
        return Finding("adapter", "no", "the adapter holds values that are not finite")
    if zero:
        level = "no" if len(zero) == len(largest) else "unsure"
        return Finding("adapter", level, f"{len(zero)} of {len(largest)} modules have learned nothing, e.g. {zero[0]}")
    return Finding("adapter", "yes", f"all {len(largest)} modules have learned something")


def judge_spread(before: float, after: float) -> Finding:
    """Whether what the model sees in noise keeps its contrast: collapse makes pictures grey, divergence burns them."""
    ratio = after / before if before else math.inf
    said = f"contrast of what it sees in noise {before:.2f} before and {after:.2f} after"
    if not _FAR_SPREAD[0] <= ratio <= _FAR_SPREAD[1]:
        return Finding("collapse", "no", f"{said}: the model has {'collapsed' if ratio < 1 else 'diverged'}")
    if not _SPREAD[0] <= ratio <= _SPREAD[1]:
        return Finding("collapse", "unsure", f"{said}: a large change; look at previews")
    return Finding("collapse", "yes", said)
