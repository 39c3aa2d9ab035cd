"""`relay import` from ai-toolkit: one YAML (or JSON) with a list of processes, of which the first trains."""

from collections.abc import Mapping
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
    area,
    choice,
    size,
    unless,
)

_ALWAYS = "always done here"
_BUDGET = "memory.budget decides what stays in memory; `relay plan` says it"
_OTHERS = "there is no such loss or method here"
_PICTURES = "pictures only"
_DECIDES = "train.dtype and memory.bits decide the arithmetic"
_TIMESTEPS = {"sigmoid": "logit_normal", "linear": "uniform", "shift": "flux2_shift", "flux_shift": "flux2_shift"}
_TRAINERS = "sd_trainer", "diffusion_trainer", "ui_trainer"
_ARCHITECTURES = {"flux2": "dev", "flux2_klein_4b": "klein-base-4b", "flux2_klein_9b": "klein-base-9b"}


def _no(why: str, *keys: str) -> tuple[Rule, ...]:
    return tuple(Rule(key, None, remark=why) for key in keys)


def _folders(_: object, here: Tree) -> list[str]:
    """`control_path`, one folder or several, and `control_path_1` to `_3`."""
    names = [here.get("control_path"), *(here.get(f"control_path_{n}") for n in (1, 2, 3))]
    flat = [entry for name in names for entry in (name if isinstance(name, list) else [name]) if entry]
    return [str(entry) for entry in flat]


def _patterns(value: object, _: Tree) -> list[str]:
    """Parts of module names, where these are names that this program has, too."""
    parts = value if isinstance(value, list) else [value]
    names = [str(part).removeprefix("transformer.") for part in parts]
    ours = ("transformer_blocks", "single_transformer_blocks")
    if not names or not all(name.startswith(ours) for name in names):
        raise NotCarried("these name modules as that tool does; write patterns into lora.targets or lora.exclude")
    return [f"{name.rstrip('.')}.*" if name.rstrip(".")[-1].isdigit() else f"*{name}*" for name in names]


def _ema(value: object, here: Tree) -> object:
    if not here.get("use_ema"):
        raise NotCarried("")
    return value


def _factor(value: object, here: Tree) -> object:
    """Of LoKr, -1 for the factor near the square root; other kinds have it in their files without a meaning."""
    if here.get("type") != "lokr":
        raise NotCarried("")
    return "auto" if value == -1 else value


def _full_rank(value: object, here: Tree) -> object:
    is_meant = here.get("type") == "lokr" and value
    raise NotCarried("the larger matrix is whole where lora.rank is at least half its side" if is_meant else "")


def _trains(value: object, _: Tree) -> object:
    raise NotCarried("" if value in _TRAINERS else "only training is carried over")


def _timesteps(value: object, here: Tree) -> object:
    """Where `weighted` weighs the levels, `content_or_style` may still say how they are drawn."""
    if value == "weighted":
        return here["content_or_style"] if here.get("content_or_style") in ("content", "style") else "uniform"
    return choice({**_TIMESTEPS}, "this distribution of noise levels is not here")(value, here)


def _quantized(bits: int) -> Mapping[object, object]:
    return {True: bits, False: 16}


NETWORK = (
    Rule("network.type", "lora.kind", choice({"lora": "lora", "lokr": "lokr"}, "lora.kind is lora, dora or lokr")),
    Rule("network.linear", "lora.rank"),
    Rule("network.linear_alpha", "lora.alpha"),
    Rule("network.dropout", "lora.dropout"),
    Rule("network.pretrained_lora_path", "lora.init"),
    Rule("network.network_kwargs.only_if_contains", "lora.targets", _patterns),
    Rule("network.network_kwargs.ignore_if_contains", "lora.exclude", _patterns),
    *_no("a FLUX.2 transformer has no convolutions", "network.conv", "network.conv_alpha"),
    Rule("network.lokr_factor", "lora.factor", _factor),
    Rule("network.lokr_full_rank", "", _full_rank),
    *_no(_OTHERS, "network.network_kwargs.*"),
)
DATA = (
    Rule("datasets.*.folder_path", "data.*.path"),
    Rule("datasets.*.dataset_path", "data.*.path"),
    Rule("datasets.*.resolution", "data.*.resolutions", area),
    Rule("datasets.*.num_repeats", "data.*.repeats"),
    Rule("datasets.*.trigger_word", "data.*.trigger"),
    Rule("datasets.*.mask_path", "data.*.masks"),
    Rule("datasets.*.alpha_mask", "data.*.masks", choice({True: "alpha"}, "")),
    Rule("datasets.*.control_path", "data.*.references", _folders),
    *(Rule(f"datasets.*.control_path_{n}", "data.*.references", _folders) for n in (1, 2, 3)),
    Rule("datasets.*.is_reg", "data.*.prior"),
    Rule("datasets.*.prior_reg", "data.*.prior"),
    Rule("datasets.*.flip_x", "data.*.flip"),
    Rule("datasets.*.random_crop", "data.*.crop", choice({True: "random", False: "center"})),
    Rule("datasets.*.caption_dropout_rate", "train.caption_dropout", remark="one for all data here"),
    Rule("datasets.*.caption_ext", "", unless("txt", "captions are read from .txt files: rename them")),
    Rule("datasets.*.buckets", "", unless(True, "pictures are always put in buckets of their shape")),
    Rule("datasets.*.flip_y", "", unless(False, "pictures are mirrored from side to side alone")),
    Rule("datasets.*.shuffle_tokens", "", unless(False, "captions are encoded once, as they are written")),
    Rule("datasets.*.network_weight", "", unless(1, "an adapter has one strength; repeats weigh folders")),
    *_no("", *(f"datasets.*.{name}" for name in ("cache_latents_to_disk", "cache_latents", "cache_text_embeddings"))),
    *_no("every picture needs a caption (an empty file is one)", "datasets.*.default_caption"),
    *_no("white is trained on, black is not", "datasets.*.mask_min_value"),
    *_no(_PICTURES, *(f"datasets.*.{n}" for n in ("num_frames", "shrink_video_to_frames", "fps", "do_i2v"))),
    *_no("captions are encoded once, as they are written", "datasets.*.keep_tokens", "datasets.*.token_dropout_rate"),
    *_no("repeats weigh folders", "datasets.*.loss_multiplier", "datasets.*.lora_weight"),
    *_no("no noise is added to references or masks", "datasets.*.controls", "datasets.*.standardize_images"),
)
TRAIN = (
    Rule("train.batch_size", "train.batch"),
    Rule("train.steps", "train.steps"),
    Rule("train.gradient_accumulation", "train.accumulate"),
    Rule("train.gradient_accumulation_steps", "train.accumulate"),
    Rule("train.lr", "train.lr"),
    Rule("train.lr_scheduler", "train.schedule", choice(SCHEDULES)),
    Rule("train.lr_scheduler_params.num_warmup_steps", "train.warmup"),
    Rule("train.lr_scheduler_params.warmup_steps", "train.warmup"),
    Rule("train.optimizer", "train.optimizer", choice(OPTIMIZERS), "its moments are float32 here, never 8 bit"),
    Rule("train.optimizer_params.weight_decay", "train.weight_decay"),
    Rule("train.optimizer_params.betas", "train.betas"),
    Rule("train.optimizer_params.eps", "train.eps"),
    Rule("train.max_grad_norm", "train.clip"),
    Rule("train.timestep_type", "train.sigma", _timesteps),
    Rule("train.content_or_style", "train.sigma", choice({"content": "content", "style": "style"}, "")),
    Rule("train.dtype", "train.dtype", choice({**DTYPES, "fp16": "bfloat16"})),
    Rule("train.ema_config.ema_decay", "train.ema", _ema),
    Rule("train.seed", "run.seed"),
    Rule("train.disable_sampling", "previews.every", choice({True: 0}, "")),
    Rule("train.reg_weight", "train.prior_weight"),
    Rule("train.train_unet", "", unless(True, "the transformer is what is trained")),
    Rule("train.train_text_encoder", "", unless(False, "the text encoder is never trained")),
    Rule("train.noise_scheduler", "", unless("flowmatch", "FLUX.2 is trained by flow matching alone")),
    Rule("train.loss_type", "", unless("mse", "the loss is the mean squared error")),
    Rule("train.linear_timesteps", "", unless(False, "set train.sigma: uniform and train.weighting")),
    *_no("", "train.ema_config.use_ema", "train.gradient_checkpointing", "train.cache_text_embeddings"),
    *_no("", "train.unload_text_encoder", "train.skip_first_sample", "train.force_first_sample"),
    *_no(_OTHERS, "train.diff_output_preservation", "train.diff_output_preservation_multiplier"),
    *_no(_OTHERS, "train.diff_output_preservation_class", "train.blank_prompt_preservation"),
    *_no(_OTHERS, "train.blank_prompt_preservation_multiplier", "train.switch_boundary_every"),
    *_no("train.guidance is what a guidance-distilled model is told", "train.bypass_guidance_embedding"),
)
MODEL = (
    Rule("model.name_or_path", "model.path"),
    Rule("model.arch", "model.name", choice({**_ARCHITECTURES}, "only FLUX.2 is trained here")),
    Rule("model.quantize", "memory.bits", choice(_quantized(8)), "affine groups here"),
    Rule("model.quantize_te", "encode.bits", choice(_quantized(8)), "affine groups here"),
    Rule("model.lora_path", "lora.init"),
    Rule("model.qtype", "", unless("qfloat8", "say memory.bits: 8, 6 or 4")),
    Rule("model.qtype_te", "", unless("qfloat8", "say encode.bits: 8, 6 or 4")),
    *_no(_BUDGET, "model.low_vram", "model.layer_offloading", "model.layer_offloading_text_encoder_percent"),
    *_no(_BUDGET, "model.layer_offloading_transformer_percent"),
    *_no(_DECIDES, "model.dtype", "model.compile"),
    *_no("", "model.is_flux", "model.model_kwargs.*", "model.model_kwargs"),
    *_no("a base model needs no adapter to be trained", "model.assistant_lora_path"),
)
SAVE = (
    Rule("save.dtype", "save.dtype", choice({**DTYPES})),
    Rule("save.save_every", "save.every"),
    Rule("save.max_step_saves_to_keep", "save.keep"),
    Rule("save.save_format", "", unless("diffusers", "the adapter has diffusers' names; `relay export` has others")),
    *_no("nothing is uploaded by this program", "save.push_to_hub", "save.hf_repo_id", "save.hf_private"),
)
SAMPLE = (
    Rule("sample.sample_every", "previews.every"),
    Rule("sample.width", "previews.size", size("width", "height")),
    Rule("sample.height", "previews.size", size("width", "height")),
    Rule("sample.seed", "previews.seed"),
    Rule("sample.guidance_scale", "previews.guidance"),
    Rule("sample.sample_steps", "previews.steps"),
    *_no("", "sample.sampler", "sample.prompts", "sample.samples", "sample.neg", "sample.walk_seed"),
    *_no("", "sample.sample_start_step", "sample.num_frames", "sample.fps"),
)
PROCESS = (
    Rule("training_folder", "run.dir", remark="the run folder is run.dir/run.name"),
    Rule("type", "", _trains),
    *_no("", "device", "performance_log_every", "sqlite_db_path", "trigger_word", "log_dir"),
    *_no("metrics lie in the run folder", "logging.*"),
    *NETWORK, *DATA, *TRAIN, *MODEL, *SAVE, *SAMPLE,
)  # fmt: skip


def read(tree: Mapping[str, Any], _: Path, carried: Carried) -> None:
    """The config of a job: its first process."""
    config = tree["config"]
    process = {key: value for key, value in config["process"][0].items() if value is not None}
    if config.get("name"):
        carried.put("run.name", str(config["name"]), "ai-toolkit: name")
    apply(PROCESS, process, carried)
    for number in range(1, len(config["process"])):
        carried.leave(f"config.process.{number}", "", "a config is one training; the others need files of their own")
    trigger = process.get("trigger_word")
    for number in range(len(process.get("datasets") or ())) if trigger else ():
        if f"data.{number}.trigger" not in carried.values:
            carried.put(f"data.{number}.trigger", str(trigger), "ai-toolkit: trigger_word")
    if (process.get("train") or {}).get("timestep_type") == "weighted":  # noise levels by weights, not by their number
        carried.put("train.weighting", "weighted", "ai-toolkit: timestep_type")
    sample = process.get("sample") or {}
    prompts = _prompts(sample, str(trigger or ""))
    if prompts:
        carried.put("previews.prompts", prompts, "ai-toolkit: prompts")


_OF_SAMPLE = {"seed": "seed", "sample_steps": "steps", "guidance_scale": "guidance", "neg": "negative"}


def _prompts(sample: Mapping[str, Any], trigger: str) -> list[object]:
    """`prompts` as texts or `samples` as mappings; `walk_seed` gives each a seed of its own."""
    given = [{"prompt": prompt} for prompt in sample.get("prompts") or ()] + list(sample.get("samples") or ())
    prompts: list[object] = []
    for number, entry in enumerate(given):
        made: dict[str, object] = {"prompt": str(entry.get("prompt", "")).replace("[trigger]", trigger)}
        if "width" in entry or "height" in entry:
            made["size"] = size("width", "height", int(sample.get("width", 512)))(None, entry)
        if sample.get("walk_seed") and "seed" not in entry:
            made["seed"] = int(sample.get("seed", 42)) + number
        made |= {ours: entry[theirs] for theirs, ours in _OF_SAMPLE.items() if entry.get(theirs) not in (None, "")}
        if sample.get("neg") and "negative" not in made:
            made["negative"] = str(sample["neg"])
        controls = [entry[key] for key in ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3") if entry.get(key)]
        made |= {"references": [str(control) for control in controls]} if controls else {}
        prompts.append(made if len(made) > 1 else made["prompt"])
    return prompts
