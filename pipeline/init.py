"""`relay init`: a commented config that fits a data set and this machine; every value says why it is what it is."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from flux2_relay.pipeline import commented, init_data, init_machine
from flux2_relay.pipeline.cache_commands import print_json
from flux2_relay.pipeline.commented import Line
from flux2_relay.pipeline.init_data import Found
from flux2_relay.pipeline.init_machine import Fit, Model
from flux2_relay.pipeline.labels import entry
from flux2_relay.stages.measure import in_words

_VIEWS = 50
"""How often a picture is seen: about 1000 steps for twenty pictures."""
_STEPS = 500, 3000  # the customary range
_WORTH_HOLDING_OUT = 50  # pictures
_SMALL_MODEL = 1e9  # parameters of blocks, below which a batch of one leaves the device idle


def run(folder: Path, output: Path | None, named: str | None, how: tuple[bool, bool]) -> None:
    """Look, choose, write the file, and say what is in it; `how` is force and as_json."""
    force, as_json = how
    found = init_data.look(folder)
    model = init_machine.model(named)
    batch = _batch(model, found)
    fit = init_machine.fit(model, found, batch)
    if (least := min(found.buckets(fit.resolution).values())) < batch:  # else batches would show a picture twice
        batch = least
        fit = init_machine.fit(model, found, batch)
    name = re.sub(r"[^\w.-]+", "-", folder.absolute().stem).strip("-.") or "lora"
    path = output or Path(f"{name}.yaml")
    lines = [line for part in _parts(name, found, model, fit, batch) for line in part]
    commented.save(path, commented.document(_head(path, found, model, fit), lines), force)
    if as_json:
        print_json(_told(path, found, model, fit))
    else:
        _tell(path, found, model, fit)


def _parts(name: str, found: Found, model: Model, fit: Fit, batch: int) -> Iterator[Iterator[Line]]:
    yield _run(name, model)
    yield _data(found, fit)
    yield _encode_and_store(fit)
    yield _train(found, fit, batch)
    yield _memory(fit)
    yield _save(found, batch)
    yield _previews(found, model, fit, batch)


def _batch(model: Model, found: Found) -> int:
    blocks, hidden = model.transformer.blocks, model.transformer.hidden
    is_small = 12 * blocks * hidden**2 < _SMALL_MODEL
    return max(1, min(4, len(found.samples) // 2)) if is_small else 1


def _steps(found: Found, batch: int) -> int:
    asked = _VIEWS * len(found.samples) * found.options.repeats / batch
    return round(min(max(asked, _STEPS[0]), _STEPS[1]) / 50) * 50


def _every(found: Found, batch: int) -> int:
    """A quarter of the run, but not above the customary 250 steps."""
    return min(250, max(50, round(_steps(found, batch) / 4 / 50) * 50))


def _head(path: Path, found: Found, model: Model, fit: Fit) -> list[str]:
    pictures = _count(len(found.samples), "picture")
    return [
        f"A LoRA on {model.name or model.path} from {pictures} in {found.options.path}.",
        "",
        *([f"  {model.to_download}"] if model.to_download else []),
        *(f"  relay {command} -c {shlex.quote(str(path))}" for command in ("plan", "encode", "train")),
        "",
        f"Chosen by `relay init` for this machine: {fit.device}, {in_words(fit.budget_bytes)} for each stage.",
        "What is not here has its default; docs/config.md explains every key.",
    ]


def _run(name: str, model: Model) -> Iterator[Line]:
    yield Line("run.name", name, f"the run folder is runs/{name}; another name for another LoRA, the store serves all")
    yield Line("run.seed", 0, "everything random is a function of seed, step and item")
    yield Line("model.path", model.path, model.why + (f"; not here yet: {model.to_download}" * bool(model.to_download)))
    if model.name is not None:
        yield Line("model.name", model.name, "a folder that holds another model is refused")
    if model.distilled:
        base = f"klein-base-{model.name.rpartition('-')[2]}" if model.name else "its base"
        yield Line(
            "model.name",
            base,
            "the model above is distilled, and LoRAs on it tend to come out grey: train its base",
            is_set=False,
        )


def _data(found: Found, fit: Fit) -> Iterator[Line]:
    options = found.options
    yield Line("data.0.path", options.path, f"{_count(len(found.samples), 'picture')}, each with its caption")
    yield Line("data.0.resolutions", [fit.resolution], f"area budget R x R: {fit.why}; {_buckets(found, fit)}")
    if fit.resolution > 512:
        yield Line("data.0.resolutions", [512], "fewer tokens, so each step takes far less time", is_set=False)
    if options.trigger is None:
        yield Line("data.0.trigger", "ohwx", "a word for what is learned, put in front of every caption", is_set=False)
    else:
        yield Line("data.0.trigger", options.trigger, found.trigger_why)
    if options.repeats > 1:
        yield Line("data.0.repeats", options.repeats, found.repeats_why)
    if options.masks is not None:
        yield Line("data.0.masks", options.masks, "masks (-masklabel) lie beside the pictures; white is trained on")
    elif found.transparent:
        why = f"{found.transparent} pictures have transparent pixels, which are laid on white: or leave them out"
        yield Line("data.0.masks", "alpha", why, is_set=False)
    if found.several_lines:
        why = f"{_count(found.several_lines, 'caption')} with several lines: makes each a caption, one drawn each time"
        yield Line("data.0.captions", "lines", why, is_set=False)


def _buckets(found: Found, fit: Fit) -> str:
    usual = [f"{w} x {h} ({count})" for (w, h), count in found.buckets(fit.resolution).most_common(3)]
    small = found.small(fit.resolution)
    return "mostly " + ", ".join(usual) + (f"; {small} smaller ones keep their pixels" if small else "")


def _encode_and_store(fit: Fit) -> Iterator[Line]:
    if fit.is_gpu:
        yield Line("encode.bits", 8, "of the text encoder: 8 is near bfloat16; 16 leaves the weights as they are")
    else:
        yield Line("encode.bits", 32, "bfloat16 is slow on a CPU")
    yield Line("cache.path", "store.zarr", "may serve many configs: what two of them share is encoded once")


def _train(found: Found, fit: Fit, batch: int) -> Iterator[Line]:
    yield Line("lora.rank", 16, "customary are 16 to 32; size of the adapter and of the optimizer's state grow with it")
    yield Line("lora.alpha", 16, "equal to rank, a change of rank leaves lr as it is")
    steps = _steps(found, batch)
    views = round(steps * batch / len(found.samples))
    yield Line("train.steps", steps, f"each picture about {views} times; stop earlier where the previews are good")
    yield Line("train.batch", batch, "customary" if batch == 1 else "one at a time leaves so small a model idle")
    if len(found.samples) >= _WORTH_HOLDING_OUT:
        yield Line("train.accumulate", 2, "with so many pictures: the mean of two passes is steadier", is_set=False)
    yield Line("train.lr", 1e-4, "customary for this rank and AdamW")
    yield Line("train.warmup", 50, "a gentle start where the first steps are rough", is_set=False)
    yield Line("train.caption_dropout", 0.05, "share of items with the empty caption, for guidance later on")
    if not fit.is_gpu:
        yield Line("train.dtype", "float32", "bfloat16 is slow on a CPU")
    held = len(found.samples) >= _WORTH_HOLDING_OUT
    why = "this share is not trained on; a held-out loss that rises says that the LoRA learns by heart"
    yield Line("validation.fraction", 0.05, why, is_set=held)


def _memory(fit: Fit) -> Iterator[Line]:
    yield Line("memory.budget", "auto", f"here {in_words(fit.budget_bytes)}; say 12GB to leave more to other programs")
    layout = fit.layout
    where = "all blocks in memory" if not layout.streamed else f"{layout.resident} of {layout.blocks} blocks in memory"
    found = f"here {where}, predicted peak {in_words(layout.peak_bytes)}"
    if not fit.is_gpu:
        yield Line("memory.bits", 32, f"bfloat16 is slow on a CPU; {found}")
    elif layout.bits == 16:
        yield Line("memory.bits", 16, f"bfloat16, the weights as they are; {found}")
    else:
        yield Line("memory.bits", 8, f"bfloat16 weights do not fit; 8 bit costs little; {found}")


def _save(found: Found, batch: int) -> Iterator[Line]:
    yield Line("save.every", _every(found, batch), "steps between checkpoints; a run goes on from the newest")
    yield Line("save.keep", 4, "older ones are removed")


def _previews(found: Found, model: Model, fit: Fit, batch: int) -> Iterator[Line]:
    (width, height), _ = found.buckets(fit.resolution).most_common(1)[0]
    yield Line("previews.every", _every(found, batch), "and at step 0, before anything is learned; 0 draws none")
    yield Line("previews.size", [width, height], "the commonest size of the data set")
    if model.distilled:
        yield Line("previews.steps", 4, "a distilled model needs few")
        yield Line("previews.guidance", 1.0, "a distilled model has its guidance built in")
    else:
        yield Line("previews.steps", 28, "denoising steps; fewer is faster and rougher")
        yield Line("previews.guidance", 4.0, "customary for this model")
    why = "the data set's own captions, which it should learn, and one that it should leave alone"
    yield Line("previews.prompts", _prompts(found), why)


def _prompts(found: Found) -> list[object]:
    samples = found.samples
    chosen = dict.fromkeys(sample.captions[0] for sample in (samples[0], samples[len(samples) // 2]))
    references = {sample.captions[0]: sample.references for sample in samples}
    prompts: list[object] = []
    for caption in chosen:
        paths = [str(path) for path in references[caption]]
        prompts.append({"prompt": caption, "references": paths} if paths else caption)
    return prompts if any(references.values()) else [*prompts, "a photo of a red fox in the snow"]


def _tell(path: Path, found: Found, model: Model, fit: Fit) -> None:
    buckets = found.buckets(fit.resolution)
    entry("config", str(path))
    entry("model", f"{model.path}: {model.why}")
    if model.distilled:
        entry("", "warning: it is distilled, and LoRAs trained on it tend to come out grey; train its base instead")
    entry("data", f"{_count(len(found.samples), 'picture')} in {_count(len(buckets), 'bucket')} at {fit.resolution}")
    if found.options.trigger:
        entry("trigger", f"{found.options.trigger}: {found.trigger_why}")
    entry("memory", f"{fit.layout.in_words()}; the budget is {in_words(fit.budget_bytes)}")
    if model.to_download:
        entry("download", model.to_download)
    entry("next", f"relay plan -c {shlex.quote(str(path))}")


def _told(path: Path, found: Found, model: Model, fit: Fit) -> dict[str, object]:
    """The same for a program."""
    buckets = found.buckets(fit.resolution)
    return {
        "config": str(path),
        "model": {"name": model.name, "path": model.path, "distilled": model.distilled, "why": model.why},
        "download": model.to_download,
        "pictures": len(found.samples),
        "buckets": [[width, height, count] for (width, height), count in sorted(buckets.items())],
        "resolution": fit.resolution,
        "trigger": found.options.trigger,
        "memory": {
            "layout": fit.layout.in_words(),
            "peak_bytes": fit.layout.peak_bytes,
            "budget_bytes": fit.budget_bytes,
        },
        "next": f"relay plan -c {shlex.quote(str(path))}",
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
