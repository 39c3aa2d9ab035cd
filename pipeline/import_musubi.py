"""`relay import` from musubi-tuner: the data set's TOML, and the flags of its training script."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux2_relay.pipeline.import_rules import (
    DTYPES,
    OPTIMIZERS,
    SCHEDULES,
    Carried,
    NotCarried,
    Rule,
    Tree,
    apply,
    choice,
    put_epochs,
    rectangle,
    unless,
)

_ALWAYS = "always done here"
_BUDGET = "memory.budget decides what stays in memory; `relay plan` says it"
_KERNELS = "a matter of the other tool's kernels"
_PICTURES = "pictures only"
_WORKERS = "reading ahead needs no setting here"


def _no(why: str, *keys: str) -> tuple[Rule, ...]:
    return tuple(Rule(key, None, remark=why) for key in keys)


def _folder_of_shards(value: object, _: Tree) -> object:
    """The first of several files stands for all of them there; here their folder does."""
    path = Path(str(value))
    return str(path.parent) if re.search(r"\d+-of-\d+", path.name) else str(value)


def _warmup(value: object, here: Tree) -> object:
    if isinstance(value, float) and 0 < value < 1:
        raise NotCarried("train.warmup counts steps, not a share of the run")
    return value


def _optimizer_options(value: object, _: Tree) -> object:
    raise NotCarried("set train.betas, train.eps and train.weight_decay instead")


DATASETS = (
    Rule("datasets.*.image_directory", "data.*.path"),
    Rule("datasets.*.image_jsonl_file", "data.*.path"),
    Rule("datasets.*.resolution", "data.*.resolutions", rectangle, "an area budget here, buckets follow from it"),
    Rule("datasets.*.num_repeats", "data.*.repeats"),
    Rule("datasets.*.bucket_no_upscale", "data.*.upscale", lambda value, _: not value, "the opposite of it"),
    Rule("datasets.*.control_directory", "data.*.references", lambda value, _: [str(value)]),
    Rule("datasets.*.batch_size", "train.batch", remark="one for all data here"),
    Rule("datasets.*.caption_extension", "", unless(".txt", "captions are read from .txt files: rename them")),
    Rule("datasets.*.enable_bucket", "", unless(True, "pictures are always put in buckets of their shape")),
    *_no("the store (cache.path) holds the entries of all data", "datasets.*.cache_directory"),
    *_no("references keep their own area budget", "datasets.*.control_resolution", "datasets.*.no_resize_control"),
    *_no("references keep their own area budget", "datasets.*.flux_kontext_no_resize_control"),
    *_no(_PICTURES, "datasets.*.video_directory", "datasets.*.video_jsonl_file", "datasets.*.target_frames"),
    *_no(_PICTURES, "datasets.*.frame_extraction", "datasets.*.frame_stride", "datasets.*.frame_sample"),
    *_no(_PICTURES, "datasets.*.max_frames", "datasets.*.source_fps", "datasets.*.multiple_target"),
)
SIGMA = {"flux2_shift": "flux2_shift", "uniform": "uniform", "sigmoid": "logit_normal", "shift": "shift"}
FLAGS = (
    Rule("dit", "model.path"),
    Rule("vae", "model.vae"),
    Rule("text_encoder", "model.text_encoder", _folder_of_shards),
    Rule("model_version", "model.name"),
    Rule("output_name", "run.name"),
    Rule("output_dir", "run.dir", remark="the run folder is run.dir/run.name"),
    Rule("seed", "run.seed"),
    Rule("network_dim", "lora.rank"),
    Rule("network_alpha", "lora.alpha"),
    Rule("network_dropout", "lora.dropout"),
    Rule("network_weights", "lora.init"),
    Rule("learning_rate", "train.lr"),
    Rule("lr_scheduler", "train.schedule", choice(SCHEDULES)),
    Rule("lr_warmup_steps", "train.warmup", _warmup),
    Rule("max_train_steps", "train.steps"),
    Rule("gradient_accumulation_steps", "train.accumulate"),
    Rule("max_grad_norm", "train.clip"),
    Rule("optimizer_type", "train.optimizer", choice(OPTIMIZERS), "its moments are float32 here, never 8 bit"),
    Rule("timestep_sampling", "train.sigma", choice({**SIGMA}, "this distribution of noise levels is not here")),
    Rule("discrete_flow_shift", "train.sigma_shift", remark="obeyed with `sigma: shift` alone"),
    Rule("weighting_scheme", "train.weighting", choice({"none": "none"}, "weightings here are none, bell, weighted")),
    Rule("guidance_scale", "train.guidance"),
    Rule("mixed_precision", "train.dtype", choice({"bf16": "bfloat16", "no": "float32"}, "bfloat16 or float32 here")),
    Rule("fp8_base", "memory.bits", choice({True: 8}), "fp8 there, 8 bit in groups here"),
    Rule("fp8_scaled", "memory.bits", choice({True: 8}), "fp8 there, 8 bit in groups here"),
    Rule("fp8_text_encoder", "encode.bits", choice({True: 8}), "fp8 there, 8 bit in groups here"),
    Rule("fp8_t5", "encode.bits", choice({True: 8}), "fp8 there, 8 bit in groups here"),
    Rule("save_every_n_steps", "save.every"),
    Rule("save_precision", "save.dtype", choice({**DTYPES})),
    Rule("sample_every_n_steps", "previews.every"),
    Rule("log_with", "log.tensorboard", choice({"tensorboard": True, "all": True}, "only TensorBoard's files")),
    Rule("network_module", "", unless("networks.lora_flux_2", "lora.kind is lora, dora or lokr")),
    Rule("optimizer_args", "", _optimizer_options),
    *_no("", "dataset_config", "max_train_epochs", "sample_prompts", "sample_at_first", "save_state", "config_file"),
    *_no("regular expressions over other module names; write patterns into lora.targets", "network_args"),
    *_no("save.every counts steps, previews.every too", "save_every_n_epochs", "sample_every_n_epochs"),
    *_no("save.keep counts checkpoints", "save_last_n_steps", "save_last_n_epochs"),
    *_no(f"{_ALWAYS}: gradients are computed block by block", "gradient_checkpointing"),
    *_no(f"{_ALWAYS}: gradients are computed block by block", "gradient_checkpointing_cpu_offload"),
    *_no(_BUDGET, "blocks_to_swap", "use_pinned_memory_for_block_swap", "img_in_txt_in_offloading"),
    *_no(_KERNELS, "sdpa", "flash_attn", "flash3", "sage_attn", "xformers", "split_attn", "compile", "cuda_allow_tf32"),
    *_no(_WORKERS, "max_data_loader_n_workers", "persistent_data_loader_workers", "num_cpu_threads_per_process"),
    *_no("set train.sigma: logit_normal; its width is fixed", "sigmoid_scale", "logit_mean", "logit_std"),
    *_no("metrics lie in the run folder", "logging_dir", "log_prefix", "log_tracker_name", "wandb_run_name"),
    *_no("a run goes on by itself from its newest checkpoint", "resume"),
    *_no("vae and encoder compute in float32 and at encode.bits", "vae_dtype", "text_encoder_dtype"),
    *_no("there is no such limit on a LoRA's norm", "scale_weight_norms"),
)


def from_toml(tree: Mapping[str, Any], carried: Carried) -> None:
    """A data set's TOML: `[general]` fills what a `[[datasets]]` leaves out."""
    general = dict(tree.get("general", {}))
    datasets = [{"bucket_no_upscale": False, **general, **entry} for entry in tree.get("datasets", [])]
    rest = {key: value for key, value in tree.items() if key not in ("general", "datasets")}
    batches = {entry.get("batch_size", 1) for entry in datasets}
    apply(DATASETS, {"datasets": datasets, **rest}, carried)
    if len(batches) > 1:
        carried.leave("batch_size", sorted(map(str, batches)), "data sets have different ones; there is one here")


def from_flags(flags: Mapping[str, object], carried: Carried) -> None:
    """The flags of the training script, however they were given."""
    if "network_alpha" not in flags:
        carried.put("lora.alpha", 1.0, "musubi-tuner's default, a weak LoRA; alpha equal to rank is customary")
    apply(FLAGS, flags, carried)
    if "sample_prompts" in flags:
        _prompts(Path(str(flags["sample_prompts"])), carried)


def finish(flags: Mapping[str, object], carried: Carried) -> None:
    """What needs flags and data together."""
    if "max_train_epochs" in flags:
        put_epochs(carried, "max_train_epochs", flags["max_train_epochs"])


_SEVERAL = "network_args", "optimizer_args", "lr_scheduler_args"


def read_flags(text: str) -> dict[str, object]:
    """`--name value` from a command line or a shell script: numbers as numbers, a bare flag as True.

    Only a few flags take several values; other words are the script and the program that it starts.
    """
    try:
        words = shlex.split(text.replace("\\\n", " ").replace("\\\r\n", " ").replace("^\n", " "), comments=True)
    except ValueError:
        words = text.split()
    flags: dict[str, object] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags[name] = _value(value) if equals else True
            name = None if equals else name
        elif name is not None and (flags[name] is True or name in _SEVERAL):
            before = flags[name]
            flags[name] = (
                _value(word) if before is True else [*(before if isinstance(before, list) else [before]), word]
            )
    return flags


def _value(word: str) -> object:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


_OPTION = re.compile(r"\s--(w|h|d|s|g|l|n|ci|f|fs|i)\s+")
_OF_PROMPT = {"d": "seed", "s": "steps", "l": "guidance", "n": "negative"}


def _prompts(path: Path, carried: Carried) -> None:
    """A file with a prompt a line and options behind it."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        carried.leave("sample_prompts", path, "the file is not here; write its prompts under previews.prompts")
        return
    prompts = [_prompt(line) for line in map(str.strip, lines) if line and not line.startswith("#")]
    carried.put("previews.prompts", prompts, f"musubi-tuner: {path.name}", "sample_prompts")


def _prompt(line: str) -> object:
    prompt, *rest = _OPTION.split(" " + line)
    options = dict(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))
    entry: dict[str, object] = {"prompt": prompt.strip()}
    if "w" in options or "h" in options:
        sides: Sequence[object] = [_value(options.get(side, "512")) for side in "wh"]
        entry["size"] = [max(16, round(side / 16) * 16) for side in sides if isinstance(side, int)]
    entry |= {ours: _value(options[theirs]) for theirs, ours in _OF_PROMPT.items() if theirs in options}
    if "g" in options and "l" not in options:
        entry["guidance"] = _value(options["g"])
    if "ci" in options:
        entry["references"] = [options["ci"]]
    return entry if len(entry) > 1 else entry["prompt"]
