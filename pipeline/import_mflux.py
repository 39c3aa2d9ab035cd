"""`relay import` from mflux: one JSON."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flux2_relay.pipeline.import_rules import (
    Carried,
    NotCarried,
    Rule,
    Tree,
    apply,
    left_out,
    passed_over,
    under,
    unless_off,
)
from flux2_relay.pipeline.import_values import (
    BUDGET,
    OPTIMIZERS,
    SCHEDULES,
    area,
    choice,
    put_epochs,
    size,
)
from flux2_relay.stages.catalogue import CATALOGUE, SOURCES
from flux2_relay.stages.encode.captions import read_text
from flux2_relay.stages.encode.companions import is_image
from flux2_relay.stages.train.transformer import block_linears

_GOES_ON = "another program's state; a run goes on by itself"
_LEVELS = "noise levels are drawn by train.sigma"
_PREVIEW = size("preview_width", "preview_height", 1024)
_OF_FOLDER = {
    "preview*": "a picture for previews there, one to train on here: move it, and name it in references of a prompt",
    "*_in.*": "put what an edit begins with in a folder of its own, named as the pictures are: data.0.references",
}
RULES = (
    Rule("model_path", "model.path"),
    Rule("seed", "run.seed"),
    Rule("steps", "previews.steps"),
    Rule("guidance", "previews.guidance"),
    Rule("quantize", "memory.bits", choice({None: 16, 8: 8, 6: 6, 4: 4}, "bits are 16, 8, 6 or 4 here")),
    Rule("max_resolution", "data.0.resolutions", area, "the longest side there, an area budget here"),
    Rule("gradient_accumulation_steps", "train.accumulate"),
    Rule("max_grad_norm", "train.clip"),
    Rule("lr_schedule.name", "train.schedule", choice(SCHEDULES)),
    Rule("lr_schedule.warmup_steps", "train.warmup"),
    Rule("save.checkpoint_frequency", "save.every"),
    Rule("save.output_path", "run.dir"),
    *passed_over("model", "data", "examples", "lora_layers", "gradient_checkpointing"),
    *unless_off(BUDGET, "low_ram", "cache_limit_gb"),
    *left_out("metrics, curves and `relay report` are in the run folder", "instrumentation.*"),
    *left_out(_GOES_ON, "statistics.*"),
    *under(
        "training_loop",
        Rule("batch_size", "train.batch"),
        *passed_over("num_epochs"),
        *left_out(_LEVELS, "timestep_low", "timestep_high", "timestep_type"),
        *left_out(_GOES_ON, "iterator_state_path"),
    ),
    *under(
        "optimizer",
        Rule("name", "train.optimizer", choice(OPTIMIZERS)),
        Rule("learning_rate", "train.lr"),
        Rule("weight_decay", "train.weight_decay"),
        *left_out(_GOES_ON, "state_path"),
    ),
    *under("checkpoint", Rule("save_frequency", "save.every"), Rule("output_path", "run.dir")),
    *under(
        "monitoring",
        Rule("preview_width", "previews.size", _PREVIEW),
        Rule("preview_height", "previews.size", _PREVIEW),
        Rule("generate_image_frequency", "previews.every"),
        Rule("gradient_accumulation_steps", "train.accumulate"),
        *left_out(
            "`relay report` draws curves, raw and smoothed", "plot_frequency", "smooth_loss", "smooth_loss_window"
        ),
        *left_out("write it under previews.prompts", "*"),
    ),
)


def read(tree: Mapping[str, Any], folder: Path, carried: Carried) -> None:
    """The whole JSON; its paths are relative to `folder`."""
    model = _model(tree, carried)
    data = tree.get("data")
    if isinstance(data, str):
        _data(folder / Path(data).expanduser(), carried)
    elif "examples" in tree or "data" in tree:
        carried.leave("examples", tree.get("examples", data), "captions stand beside the pictures here: fox.txt")
    apply(RULES, {key: value for key, value in tree.items() if data is not None or key != "max_resolution"}, carried)
    _targets(tree.get("lora_layers"), model, carried)
    epochs = (tree.get("training_loop") or {}).get("num_epochs")
    if epochs is not None:
        put_epochs(carried, "training_loop.num_epochs", epochs)


def _model(tree: Mapping[str, Any], carried: Carried) -> str:
    """The name of a model, as the catalogue has it where it is known there."""
    model = str(tree.get("model", "")).lower().removeprefix("black-forest-labs/").removeprefix("flux2-")
    model = model.removeprefix("flux.2-")
    if model in CATALOGUE:
        carried.put("model.path", SOURCES[model].repository, "mflux: model")
        carried.put("model.name", model, "mflux: model")
    elif "model" in tree:
        carried.leave("model", tree["model"], "only FLUX.2 is trained here; say model.path")
    return model


def _data(place: Path, carried: Carried) -> None:
    """A folder of pictures, in which mflux looks for the prompts of previews, too, and for pairs of an edit."""
    carried.put("data.0.path", str(place), "mflux: data")
    prompts = [read_text(file) for file in sorted(place.glob("preview*.txt"))]
    if prompts:
        carried.put(
            "previews.prompts", [prompt.strip() for prompt in prompts], "mflux: preview*.txt in the data folder"
        )
    for pattern, why in _OF_FOLDER.items():
        found = [file.name for file in sorted(place.glob(pattern)) if is_image(file)]
        if found:
            carried.leave(f"data: {pattern}", ", ".join(found), why)


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
        if known is not None and f"{found}.0" in known:
            found = f"{found}.0"  # the linear in a list of one
        if known is not None and found not in known:
            raise NotCarried("no linear of this model's blocks has that name")
        yield found


def _blocks(of: object) -> list[int]:
    if isinstance(of, Mapping) and isinstance(of.get("indices"), list):
        return [int(block) for block in of["indices"]]
    if isinstance(of, Mapping) and "end" in of:
        return list(range(int(of.get("start", 0)), min(int(of["end"]), 1000)))
    raise NotCarried("it says {block}, but not which")
