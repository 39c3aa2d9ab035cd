"""Stage two: the transformer and its LoRA, from the store alone.

One step: read the batches, predict, compare, update; every so often a checkpoint, the held-out loss, and previews as
latents (the VAE is another process). `train` needs a `Job` and tells a `Journal` what happens; it knows no config file.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx
from tqdm import tqdm

from flux2_relay.cache.errors import RelayError
from flux2_relay.stages import blas, figures, memory
from flux2_relay.stages.device_errors import in_plain_words
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.measure import in_words, peak_bytes
from flux2_relay.stages.one_model import in_turn, say_loaded
from flux2_relay.stages.quantize import QUANTIZED_BITS
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import (
    acceptance,
    agreement,
    base,
    checkpoint,
    init,
    lora,
    optimizer,
    validation,
    warnings,
    wishes,
)
from flux2_relay.stages.train.batches import Batches, items, load_ahead
from flux2_relay.stages.train.contexts import Contexts, open_contexts
from flux2_relay.stages.train.job import Job, Journal
from flux2_relay.stages.train.layout import Layout, LayoutOptions, choose, load_for, pace_of
from flux2_relay.stages.train.packed_copy import kept_bytes
from flux2_relay.stages.train.previews import Previews
from flux2_relay.stages.train.ranks import RankLost
from flux2_relay.stages.train.residence import Resident, Streamed
from flux2_relay.stages.train.running import Run
from flux2_relay.stages.train.step_work import Load
from flux2_relay.stages.train.transformer import Transformer, load_transformer, stock_of

Say = Callable[[str], None]

_WARM_UP = 2  # steps in which kernels are compiled and buffers are made
_WORTH_A_LOOK = 50  # steps from which on the short acceptance test costs next to nothing
_CACHE_BYTES = 1 << 30  # freed buffers kept for reuse; without a limit they grow with every new shape
_CACHE_OF_STREAMS = 1 << 26  # on a CPU, where blocks come and go, more would only keep blocks that are done with


def run(job: Job, folders: ModelFolders, spec: TransformerSpec, journal: Journal) -> int:
    """Load the transformer, train, and let go of it -> steps done.

    What can be refused without the transformer's weights is refused before they are read.
    """
    look_ahead(job, spec, journal)
    layout = layout_of(job, spec, stock_of(folders.transformer, spec))
    journal.say(f"memory: {layout.in_words()}")
    agreement.check(job, spec, layout)
    work = partial(_load_and_train, job, folders, spec, layout, journal)
    return in_turn("transformer", work, journal.say, layout.peak_bytes)


def look_ahead(job: Job, spec: TransformerSpec, journal: Journal) -> None:
    """Refuse what can be refused without weights, and say what is worth a sentence."""
    lora.targets(spec, job.lora)
    if job.lora.init is not None and not _has_checkpoint(job):
        init.read(job.lora, spec)
    if sentence := optimizer.advice(job.train):
        journal.say(sentence)
    for sentence in warnings.before(job, spec, lora.size(spec, job.lora)):
        journal.say(f"warning: {sentence}")


def layout_of(job: Job, spec: TransformerSpec, stored: base.Stock | None = None) -> Layout:
    """How the training fits the memory budget; InputError says the smallest that works."""
    return choose(spec, load_of(job, spec, stored), job.memory, memory.budget_bytes(job.memory.budget))


def load_of(job: Job, spec: TransformerSpec, stored: base.Stock | None = None) -> Load:
    """What a pass of the training has to carry."""
    rows = open_contexts(job.store, job.record.body, spec.context_width).length
    options = LayoutOptions(
        train=job.train, memory=job.memory, previews=job.previews, dropout=job.lora.dropout, kind=job.lora.kind
    )
    return load_for(list(items(job.record.body)), rows, lora.size(spec, job.lora), options, stored)


def _has_checkpoint(job: Job) -> bool:
    return job.resume and bool(checkpoint.saved(job.checkpoints))


def load(job: Job, folders: ModelFolders, spec: TransformerSpec, layout: Layout, say: Say) -> Transformer:
    """The transformer as the layout has it, without adapters."""
    blas.suit(spec.hidden)
    dtype = mx.float32 if job.train.dtype == "float32" else mx.bfloat16
    residence = partial(Streamed, resident=layout.resident, ahead=layout.ahead) if layout.streamed else Resident
    with in_plain_words(lambda: "Nothing was changed."):
        copy = Path(job.memory.copy).expanduser() if job.memory.copy else None
        transformer = load_transformer(folders.root, spec, layout.bits, dtype, residence, copy)
        if copy is not None and layout.bits in QUANTIZED_BITS:
            say(f"quantized blocks are kept in {copy} ({in_words(kept_bytes(copy))})")
    transformer.keep, transformer.attention_heads, transformer.joins = layout.keep, layout.heads, layout.joined
    if layout.pieces is not None:
        transformer.pieces.ahead = layout.pieces
    weights = layout.stored or f"{layout.bits} bit"
    say_loaded(f"transformer ({spec.double_blocks} + {spec.single_blocks} blocks, {weights})", say)
    return transformer


def _load_and_train(job: Job, folders: ModelFolders, spec: TransformerSpec, layout: Layout, journal: Journal) -> int:
    transformer = load(job, folders, spec, layout, journal.say)
    pace: list[float] = []
    try:
        agreement.check_weights(job.group, transformer)
        look_at_data(job, transformer, journal)
        done = train(job, transformer, journal, pace)
    finally:
        transformer.residence.close()
    if job.group.is_alone:  # the steps of several ranks say nothing about this machine
        note_pace(pace_of(spec, layout, job.train), pace)
    journal.say(f"memory: predicted peak {in_words(layout.peak_bytes)}, measured {in_words(peak_bytes())}")
    return done


def note_pace(of: Mapping[str, object], pace: Sequence[float]) -> None:
    """Remember how long the steps took, from their seconds."""
    if len(pace) > _WARM_UP:
        seconds = sum(pace[_WARM_UP:])
        usual = median(pace[_WARM_UP:])  # without validation, checkpoints and previews, which are due now and then
        figures.note("steps", of, seconds / usual, seconds)


def look_at_data(job: Job, transformer: Transformer, journal: Journal) -> None:
    """Say what is wrong with model or store before a fresh run of some length; its price is that of two steps."""
    if job.train.steps < _WORTH_A_LOOK or _has_checkpoint(job) or not job.group.is_first:
        return
    contexts = open_contexts(job.store, job.record.body, transformer.spec.context_width)
    for finding in acceptance.short(transformer, job.record.body, contexts, job.train.guidance):
        if finding.level == "no":
            journal.say(f"warning: {finding.about}: {finding.sentence}")


def train(job: Job, transformer: Transformer, journal: Journal, pace: list[float] | None = None) -> int:
    """Train until `train.steps`, `max_steps` or `stop`, from the newest checkpoint where there is one -> steps done.

    `pace` gets the seconds of each step.
    """
    limit_cache(transformer)
    under_way, batches, contexts = prepare(job, transformer, journal)
    with in_plain_words(lambda: f"No checkpoint was written of it: {under_way.where_to_go_on()}."):
        try:
            _steps(under_way, batches, contexts, [] if pace is None else pace)
            under_way.finish()
        except RankLost as error:
            raise RelayError(f"{error}; {_after_a_loss(under_way)}") from error
        except OSError as error:
            raise RelayError(f"reading or writing failed: {error}. {under_way.where_to_go_on()}") from error
    return under_way.done


def limit_cache(transformer: Transformer) -> None:
    """Bound what MLX keeps of freed buffers."""
    is_streamed = isinstance(transformer.residence, Streamed) and not memory.is_gpu()
    mx.set_cache_limit(_CACHE_OF_STREAMS if is_streamed else _CACHE_BYTES)


def prepare(job: Job, transformer: Transformer, journal: Journal) -> tuple[Run, Batches, Contexts]:
    """The run before its first step, and what its steps are made of."""
    body, held_out = validation.split(job.record.body, job.validation.fraction)
    if not job.group.is_first:  # the others wait for it in their next step
        held_out = {**held_out, "samples": []}
    contexts = open_contexts(job.store, body, transformer.spec.context_width)
    under_way = Run(
        job,
        transformer,
        journal,
        Previews(job.previews, body["prompts"], contexts, job.distilled, job.folder),
        validation.Validation(held_out, contexts, job.seed, job.train.guidance),
    )
    return under_way, Batches(body, job.train, job.seed, job.group.size), contexts


def last_step(job: Job, first: int) -> int:
    """The step in front of which this process ends that begins with `first`."""
    return job.train.steps if job.max_steps is None else min(job.train.steps, first + job.max_steps)


def is_over(under_way: Run) -> bool:
    """Obey what the run's user asks for between two steps -> whether to leave now."""
    job = under_way.job
    if _is_asked(job, wishes.SAVE) and under_way.saved != under_way.done:
        under_way.save()
    return job.group.any(_is_asked(job, wishes.STOP) or job.stop())  # the file goes away in any case


def _after_a_loss(under_way: Run) -> str:
    """Keep what was learned up to the step that a rank was lost in, and say how to go on."""
    if not under_way.job.group.is_first:
        return "with any number of ranks the next start goes on from the newest checkpoint of rank 0."
    if under_way.saved != under_way.done:
        under_way.save()
    return f"with any number of ranks {under_way.where_to_go_on()}."


def _steps(under_way: Run, batches: Batches, contexts: Contexts, pace: list[float]) -> None:
    job = under_way.job
    first = under_way.begin()
    last = last_step(job, first)
    shown = {"desc": "train", "unit": "step", "dynamic_ncols": True, "disable": not job.group.is_first}
    with tqdm(total=job.train.steps, initial=first, **shown) as bar:
        for loaded in load_ahead(batches, job.store, contexts, first, last, job.group.share):
            started = time.perf_counter()
            loss = under_way.step(loaded)
            pace.append(loaded.wait_seconds + time.perf_counter() - started)
            bar.set_postfix(loss="skipped" if loss is None else f"{loss:.4f}", refresh=False)
            bar.update()
            if is_over(under_way):
                break


def _is_asked(job: Job, wish: str) -> bool:
    """Whether the run folder holds this wish; only the first rank has one."""
    return job.group.is_first and wishes.is_asked(job.folder, wish)
