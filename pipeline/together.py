"""`relay train` on several runs at once: each with its own folder, lock, journal and page, all over one base."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.pipeline import closing, commands, events, live, origin, run_folder, run_lock
from flux2_relay.pipeline.commands import Ready
from flux2_relay.pipeline.config import Config, flat
from flux2_relay.pipeline.run_folder import RunFolder, say
from flux2_relay.stages.weights import listing

if TYPE_CHECKING:
    from flux2_relay.stages.train.job import Job
    from flux2_relay.stages.train.many import Ended
    from flux2_relay.stages.train.ranks import Group

_SHARED = ("model.path", "train.dtype", "memory.")
"""Keys in which runs over one base must agree, or beginnings of such keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """One of the runs."""

    config: Config
    given: Ready
    job: "Job"
    run: RunFolder


def encode(configs: Sequence[Config], shard: str) -> None:
    """Stage one for each of the runs that asks for other entries than those before it."""
    from flux2_relay.pipeline.request import data_paths, set_request

    asked = {json.dumps([c.cache.path, data_paths(c), set_request(c)], default=str): c for c in reversed(configs)}
    for config in reversed(asked.values()):
        commands.encode(config, shard)


def train(
    configs: Sequence[Config], max_steps: int | None, resume: bool, stop: Callable[[], bool], group: "Group"
) -> None:
    """Stage two: one run as it is trained alone, several over one base.

    RelayError says which of several did not come to their end, when all others have.
    """
    if len(configs) == 1:
        commands.train(configs[0], max_steps, resume, stop, group)
        return
    if not group.is_alone:
        raise InputError("several runs at once are trained by one process; give each --hosts a single run")
    agree(configs)
    given = [commands.ready(config) for config in configs]
    for config in configs:
        if not resume:
            run_folder.refuse_existing(config.run.folder)
    with ExitStack() as held:
        for config in configs:
            held.enter_context(run_lock.hold(config.run.folder))
        left = []
        for config, of in zip(configs, given, strict=True):
            job = commands.train_job(config, of, config.run.folder)
            job = replace(job, resume=resume, max_steps=max_steps, stop=stop)
            run = commands.set_up(config, of, job, label=f"{config.run.folder}: ")
            if commands.is_finished(run, config.train.steps):
                run.say(f"is finished: {config.train.steps} steps are done; the adapter is {run.adapter}")
            else:
                left.append(_Member(config=config, given=of, job=job, run=run))
        if left:
            _train(left)
        else:
            say(f"next: {commands.after_training([config.run.folder for config in configs])}")


def agree(configs: Sequence[Config]) -> None:
    """Refuse runs that cannot share one base; InputError names every key in which they differ."""
    faults = []
    values: list[Mapping[str, object]] = [flat(config) for config in configs]
    for key in (key for key in values[0] if key.startswith(_SHARED)):
        found = dict.fromkeys(json.dumps(of[key], default=str) for of in values)
        if len(found) > 1:
            faults.append(f"{key}: {', '.join(found)}")
    if faults:
        raise InputError(listing("runs that are trained together share one base, and must agree in:", faults))


def _train(members: Sequence[_Member]) -> None:
    from flux2_relay.stages.train import many
    from flux2_relay.stages.train.transformer import stock_of

    def tell(sentence: str) -> None:
        say(sentence)
        for member in members:
            member.run.note(sentence)

    places, spec, runs = members[0].given.places, members[0].given.spec, [member.run for member in members]
    commands.say_blas()
    layout = many.layout_of([member.job for member in members], spec, stock_of(places.transformer, spec))
    for member in members:
        origin.keep(member.run, member.config, member.job, places, spec, layout)
    under_way = closing.Stage(runs[0], layout.peak_bytes, tuple(runs[1:]))
    with ExitStack() as open_:
        entries = []
        for member in members:
            journal = open_.enter_context(events.journal(member.run, member.config.log.tensorboard))
            watched = open_.enter_context(live.watched(journal, member.run, member.config))
            entries.append(many.Entry(name=str(member.run.path), job=member.job, journal=watched))
        ended = many.run(entries, places, spec, tell)
    _close(under_way, members, ended)


def _close(under_way: closing.Stage, members: Sequence[_Member], ended: "Mapping[str, Ended]") -> None:
    whole = all(ended[str(of.run.path)].done >= of.config.train.steps for of in members)
    then = commands.after_training([member.run.path for member in members]) if whole else closing.same_config("train")
    steps = sum(one.done for one in ended.values())
    under_way.close(
        f"{len(members)} runs together, {steps} of {sum(of.config.train.steps for of in members)} steps done", then
    )
    faults = [f"{name}: {one.fault}" for name, one in ended.items() if one.fault is not None]
    if faults:
        raise RelayError(listing(f"{len(faults)} of {len(members)} runs did not come to their end:", faults))
