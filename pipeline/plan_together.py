"""`relay plan` for several runs over one base: what each takes for itself, and how many fit."""

import json
from collections.abc import Sequence

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import plan, together
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.plan import Seen, Trainable
from flux2_relay.pipeline.plan_text import Member, Plan, Together
from flux2_relay.pipeline.request import data_paths, set_request
from flux2_relay.stages import figures, memory
from flux2_relay.stages.train import layout, many, step_work


def show(configs: Sequence[Config], hash_weights: bool, as_json: bool) -> None:
    """Find out and tell; InputError, after all that can be told, for what stands in the way."""
    plan.tell(plan.make(configs[0], hash_weights) if len(configs) == 1 else make(configs, hash_weights), as_json)


def make(configs: Sequence[Config], hash_weights: bool) -> Plan:
    """Find everything out; what several runs encode alike is looked at once."""
    together.agree(configs)
    looked: dict[str, Seen] = {}
    members: list[tuple[Config, Seen, Trainable]] = []
    faults: list[str] = []
    for config in configs:
        key = json.dumps([config.cache.path, data_paths(config), set_request(config)], default=str)
        if key not in looked:
            looked[key] = plan.look(config, hash_weights)
            faults += looked[key].faults
        of = plan.trainable(config, looked[key], faults)
        if of is not None:
            members.append((config, looked[key], of))
    faults = list(dict.fromkeys(faults))
    found = _together(members, faults) if members else None
    to_runs = [(config, of.disk_bytes(config)) for config, _, of in members]
    first = next(iter(looked.values()))
    return plan.whole(configs[0], first, found, to_runs, faults)


def _together(members: Sequence[tuple[Config, Seen, Trainable]], faults: list[str]) -> Together | None:
    options, spec = members[0][0].memory, members[0][2].spec
    loads, budget = [of.load for _, _, of in members], memory.budget_bytes(options.budget)
    try:
        chosen = layout.choose(spec, loads, options, budget)
    except InputError as error:
        faults.append(f"train: {error}")
        return None
    needed = chosen.peak_bytes - chosen.parts["kept projections"]
    largest = max(loads, key=lambda load: step_work.own_bytes(spec, load))
    with_another = layout.predict_together(
        spec, [*loads, largest], chosen.bits, chosen.resident, chosen.pieces, chosen.joined
    )
    pace = figures.recall("steps", many.pace_of(spec, chosen, [config.train for config, _, _ in members]))
    most = max(max(0, config.train.steps - of.done) for config, _, of in members)
    return Together(
        runs=tuple(_member(config, seen, of) for config, seen, of in members),
        layout=chosen,
        room=(budget - needed) // max(with_another.peak_bytes - needed, step_work.own_bytes(spec, largest)),
        seconds=most / pace.per_second if pace else None,
    )


def _member(config: Config, seen: Seen, of: Trainable) -> Member:
    kinds = seen.encoding.entries.values() if seen.encoding is not None else ()
    return Member(
        folder=str(config.run.folder),
        steps=config.train.steps,
        done=of.done,
        pictures=len({item.id for item in of.items}),
        own_bytes=step_work.own_bytes(of.spec, of.load),
        missing=sum(len(entries.missing) for entries in kinds),
        warnings=tuple(plan.warned(config, seen.places, of)),
    )
