"""`relay import` from mflux: one JSON."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flux2_relay.pipeline.import_rules import (
    OPTIMIZERS,
    SCHEDULES,
    Carried,
    NotCarried,
    Rule,
    Tree,
    apply,
    area,
    choice,
    put_epochs,
    size,
)
from flux2_relay.stages.catalogue import CATALOGUE, SOURCES
from flux2_relay.stages.train.transformer import block_linears

_BUDGET = "memory.budget decides what stays in memory; `relay plan` says it"
_RUN = "metrics, curves and `relay report` are in the run folder"


def _no(why: str, *keys: str) -> tuple[Rule, ...]:
    return tuple(Rule(key, None, remark=why) for key in keys)


RULES = (
    Rule("seed", "run.seed"),
    Rule("steps", "previews.steps"),
    Rule("guidance", "previews.guidance"),
    Rule("quantize", "memory.bits", choice({None: 16, 8: 8, 6: 6, 4: 4}, "bits are 16, 8, 6 or 4 here")),
    Rule("max_resolution", "data.0.resolutions", area, "the longest side there, an area budget here"),
    Rule("training_loop.batch_size", "train.batch"),
    Rule("optimizer.name", "train.optimizer", choice(OPTIMIZERS)),
    Rule("optimizer.learning_rate", "train.lr"),
    Rule("optimizer.weight_decay", "train.weight_decay"),
    Rule("lr_schedule.name", "train.schedule", choice(SCHEDULES)),
    Rule("lr_schedule.warmup_steps", "train.warmup"),
    Rule("checkpoint.save_frequency", "save.every"),
    Rule("save.checkpoint_frequency", "save.every"),
    Rule("checkpoint.output_path", "run.dir"),
    Rule("save.output_path", "run.dir"),
    Rule("monitoring.preview_width", "previews.size", size("preview_width", "preview_height", 1024)),
    Rule("monitoring.preview_height", "previews.size", size("preview_width", "preview_height", 1024)),
    Rule("monitoring.generate_image_frequency", "previews.every"),
    Rule("monitoring.gradient_accumulation_steps", "train.accumulate"),
    Rule("gradient_accumulation_steps", "train.accumulate"),
    Rule("max_grad_norm", "train.clip"),
    *_no("", "model", "data", "examples", "training_loop.num_epochs", "lora_layers", "gradient_checkpointing"),
    *_no(_BUDGET, "low_ram", "cache_limit_gb"),
    *_no("noise levels are drawn by train.sigma", "training_loop.timestep_low", "training_loop.timestep_high"),
    *_no("noise levels are drawn by train.sigma", "training_loop.timestep_type"),
    *_no("another program's iterations; a run goes on by itself", "training_loop.iterator_state_path"),
    *_no(_RUN, "monitoring.plot_frequency", "instrumentation.*"),
    *_no("preview prompts stood in preview*.txt files: write them under previews.prompts", "monitoring.*"),
)


def read(tree: Mapping[str, Any], folder: Path, carried: Carried) -> None:
    """The whole JSON; its paths are relative to `folder`."""
    model = str(tree.get("model", "")).lower().removeprefix("black-forest-labs/").removeprefix("flux2-")
    model = model.removeprefix("flux.2-")
    if model in CATALOGUE:
        carried.put("model.path", SOURCES[model].repository, "mflux: model")
        carried.put("model.name", model, "mflux: model")
    elif "model" in tree:
        carried.leave("model", tree["model"], "only FLUX.2 is trained here; say model.path")
    data = tree.get("data")
    if isinstance(data, str):
        place = Path(data).expanduser()
        carried.put("data.0.path", str(place if place.is_absolute() else folder / place), "mflux: data")
    elif "examples" in tree or "data" in tree:
        carried.leave("examples", tree.get("examples", data), "captions stand beside the pictures here: fox.txt")
    rest = {key: value for key, value in tree.items() if data is not None or key != "max_resolution"}
    apply(RULES, rest, carried)
    _targets(tree.get("lora_layers"), model, carried)
    epochs = (tree.get("training_loop") or {}).get("num_epochs")
    if epochs is not None:
        put_epochs(carried, "training_loop.num_epochs", epochs)


def _targets(layers: object, model: str, carried: Carried) -> None:
    """Targets with their blocks and ranks as patterns; alpha equal to rank is what mflux multiplies with."""
    targets = layers.get("targets") if isinstance(layers, Mapping) else None
    if not isinstance(targets, list):
        if layers is not None:
            carried.leave("lora_layers", layers, "an older form; every linear of the blocks is trained (lora.targets)")
        return
    known = block_linears(CATALOGUE[model][0]) if model in CATALOGUE else None
    patterns: dict[str, int] = {}
    for number, target in enumerate(targets):
        try:
            patterns |= {path: int(target["rank"]) for path in _paths(target, known)}
        except (NotCarried, KeyError, TypeError, ValueError, AttributeError) as reason:
            said = str(reason) if isinstance(reason, NotCarried) else "it lacks a module path or a rank"
            carried.leave(f"lora_layers.targets.{number}", target, said)
    if not patterns:
        return
    ranks = sorted(set(patterns.values()))
    carried.put("lora.rank", ranks[-1], "mflux: rank")
    carried.put("lora.alpha", float(ranks[-1]), "mflux has no alpha; equal to rank it multiplies by 1")
    every = known is not None and set(patterns) == set(known)
    carried.put("lora.targets", "blocks" if every else list(patterns), "mflux: targets")
    if len(ranks) > 1:
        carried.put("lora.ranks", {path: r for path, r in patterns.items() if r != ranks[-1]}, "mflux: rank")
        carried.leave("lora_layers", ranks, "alpha is one for all: where the rank is lower, alpha / rank is above 1")


def _paths(target: Tree, known: Mapping[str, object] | None) -> Iterator[str]:
    path, of = str(target["module_path"]), target.get("blocks")
    for block in _blocks(of) if "{block}" in path else [0]:
        found = path.replace("{block}", str(block))
        if known is not None and found not in known:
            raise NotCarried("no linear of this model's blocks has that name")
        yield found


def _blocks(of: object) -> list[int]:
    if isinstance(of, Mapping) and isinstance(of.get("indices"), list):
        return [int(block) for block in of["indices"]]
    if isinstance(of, Mapping) and "end" in of:
        return list(range(int(of.get("start", 0)), min(int(of["end"]), 1000)))
    raise NotCarried("it says {block}, but not which")
