"""`relay import` from ai-toolkit: one YAML (or JSON) with a list of processes, of which the first trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2_relay.pipeline.import_rules import (
    Carried,
    NotCarried,
    Rule,
    Tree,
    apply,
    left_out,
    only,
    passed_over,
    under,
    unless_off,
)
from flux2_relay.pipeline.import_values import (
    BUDGET,
    DTYPES,
    KERNELS,
    NO_SUCH,
    NO_UPLOAD,
    OPTIMIZERS,
    PICTURES_ONLY,
    SCHEDULES,
    area,
    choice,
    size,
)

_SATELLITES = (  # they say more of switches that are told themselves
    *("train_refiner", "show_turbo_outputs", "batch_noise_correction_scale", "signal_amplification_strength"),
    *("short_and_long_captions_encoder_split", "match_adapter_assist", "match_adapter_chance", "cfg_scale"),
    *("inverted_mask_prior_multiplier", "max_cfg_scale", "cfg_rescale", "correct_pred_norm_multiplier"),
    *("t0_velocity_equiv_weight", "do_fft_velocity_equiv_weight", "target_norm_std_value", "guidance_loss_target"),
    *("paramiter_swapping_factor", "latent_feature_loss_weight", "diffusion_feature_extractor_weight"),
    *("do_guidance_loss_cfg_zero", "guidance_loss_schedule", "unconditional_prompt", "audio_loss_multiplier"),
)
_ARITHMETIC = "train.dtype and memory.bits decide the arithmetic"
_ENCODED_ONCE = "captions are encoded once, as they are written"
_PREPARE = "pictures are trained on as they are: prepare them before"
_OTHER_MODELS = "only FLUX.2 is trained here"
_TIMESTEPS = {"sigmoid": "logit_normal", "linear": "uniform", "shift": "flux2_shift", "flux_shift": "flux2_shift"}
_TRAINERS = "sd_trainer", "diffusion_trainer", "ui_trainer"
_ARCHITECTURES = {"flux2": "dev", "flux2_klein_4b": "klein-base-4b", "flux2_klein_9b": "klein-base-9b"}
_BITS = {True: 8, False: 16}


def _folders(_: object, here: Tree) -> list[str]:
    """`control_path`, one folder or several, and `control_path_1` to `_3`."""
    names = [here.get("control_path"), *(here.get(f"control_path_{n}") for n in (1, 2, 3))]
    flat = [entry for name in names for entry in (name if isinstance(name, list) else [name]) if entry]
    return [str(entry) for entry in flat]


def _patterns(value: object, _: Tree) -> list[str]:
    """Parts of module names, where these are names that this program has, too."""
    parts = value if isinstance(value, list) else [value]
    if not parts:
        raise NotCarried("")
    names = [str(part).removeprefix("transformer.") for part in parts]
    ours = ("transformer_blocks", "single_transformer_blocks")
    if not all(name.startswith(ours) for name in names):
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


def _mask_floor(_: object, here: Tree) -> object:
    raise NotCarried("white is trained on, black is not" if here.get("mask_path") or here.get("alpha_mask") else "")


def _trains(value: object, _: Tree) -> object:
    raise NotCarried("" if value in _TRAINERS else "only training is carried over")


def _timesteps(value: object, here: Tree) -> object:
    """Where `weighted` weighs the levels, `content_or_style` may still say how they are drawn."""
    if value == "weighted":
        return here["content_or_style"] if here.get("content_or_style") in ("content", "style") else "uniform"
    return choice({**_TIMESTEPS}, "this distribution of noise levels is not here")(value, here)


NETWORK = under(
    "network",
    Rule("type", "lora.kind", choice({"lora": "lora", "lokr": "lokr"}, "lora.kind is lora, dora or lokr")),
    Rule("linear", "lora.rank"),
    Rule("rank", "lora.rank"),
    Rule("linear_alpha", "lora.alpha"),
    Rule("alpha", "lora.alpha"),
    Rule("dropout", "lora.dropout"),
    Rule("pretrained_lora_path", "lora.init"),
    Rule("network_kwargs.only_if_contains", "lora.targets", _patterns),
    Rule("network_kwargs.ignore_if_contains", "lora.exclude", _patterns),
    Rule("lokr_factor", "lora.factor", _factor),
    Rule("lokr_full_rank", "", _full_rank),
    *left_out("a FLUX.2 transformer has no convolutions", "conv", "conv_alpha"),
    *only(True, "adapters are on the transformer alone", "transformer_only"),
    *passed_over("split_multistage_loras"),
    *unless_off(BUDGET, "layer_offloading"),
    *unless_off(NO_SUCH, "lorm", "old_lokr_format", "all_layers"),
    *left_out(NO_SUCH, "network_kwargs.*"),
)
DATA = under(
    "datasets.*",
    Rule("folder_path", "data.*.path"),
    Rule("dataset_path", "data.*.path"),
    Rule("resolution", "data.*.resolutions", area),
    Rule("num_repeats", "data.*.repeats"),
    Rule("trigger_word", "data.*.trigger"),
    Rule("mask_path", "data.*.masks"),
    Rule("alpha_mask", "data.*.masks", choice({True: "alpha"}, "")),
    Rule("control_path", "data.*.references", _folders),
    *(Rule(f"control_path_{n}", "data.*.references", _folders) for n in (1, 2, 3)),
    Rule("is_reg", "data.*.prior"),
    Rule("prior_reg", "data.*.prior"),
    Rule("flip_x", "data.*.flip"),
    Rule("random_crop", "data.*.crop", choice({True: "random", False: "center"})),
    Rule("batch_size", "train.batch", remark="one for all data here"),
    Rule("caption_dropout_rate", "train.caption_dropout", remark="one for all data here"),
    *only("txt", "captions are read from .txt files: rename them", "caption_ext"),
    *only(True, "pictures are always put in buckets of their shape", "buckets"),
    *only(1, "an adapter has one strength; repeats weigh folders", "network_weight"),
    *only("image", PICTURES_ONLY, "type"),
    *only(64, "buckets are in steps of 16 pixels", "bucket_tolerance"),
    *only(1, "data.*.resolutions says how large pictures are", "scale"),
    *passed_over("cache_latents_to_disk", "cache_latents", "cache_text_embeddings", "cache_tensors_to_disk"),
    *passed_over("cache_clip_vision_to_disk", "load_image_when_caching_latents", "fast_image_size", "debug"),
    *passed_over("num_workers", "prefetch_factor", "cache_latents_num_workers", "replay_transforms"),
    *unless_off("pictures are mirrored from side to side alone", "flip_y"),
    *unless_off("every picture needs a caption (an empty file is one)", "default_caption"),
    Rule("mask_min_value", "", _mask_floor),
    *unless_off("white is trained on, black is not", "invert_mask"),
    *unless_off(_ENCODED_ONCE, "shuffle_tokens", "keep_tokens", "token_dropout_rate", "replacements"),
    *unless_off(_ENCODED_ONCE, "random_triggers", "use_short_captions", "caption_type"),
    *passed_over("random_triggers_max", "shuffle_augmentations", "clip_image_shuffle_augmentations"),
    *unless_off(_PREPARE, "random_scale", "augments", "augmentations", "square_crop", "poi", "standardize_images"),
    *left_out("repeats weigh folders", "loss_multiplier", "lora_weight"),
    *unless_off("data.*.references names folders of references", "control_from_same_folder", "controls"),
    *passed_over("num_controls_from_same_folder"),
    *left_out("references keep their own area budget", "full_size_control_images"),
    *left_out(_PREPARE, "control_transparent_color"),
    *unless_off(NO_SUCH, "inpaint_path", "unconditional_path", "clip_image_path", "clip_image_from_same_folder"),
    *unless_off(NO_SUCH, "clip_image_augmentations", "diff_output_preservation", "extra_values"),
    *passed_over("diff_output_preservation_class", "guidance_type"),
    *only(1, PICTURES_ONLY, "num_frames"),
    *unless_off(PICTURES_ONLY, "do_i2v", "auto_frame_count", "do_audio"),
    *passed_over("shrink_video_to_frames", "fps", "trim_auto_frame_count_tail"),
    *passed_over("audio_preserve_pitch", "audio_normalize"),
)
TRAIN = under(
    "train",
    Rule("batch_size", "train.batch"),
    Rule("steps", "train.steps"),
    Rule("gradient_accumulation", "train.accumulate"),
    Rule("gradient_accumulation_steps", "train.accumulate"),
    Rule("lr", "train.lr"),
    Rule("unet_lr", "train.lr"),
    Rule("lr_scheduler", "train.schedule", choice(SCHEDULES)),
    Rule("lr_scheduler_params.num_warmup_steps", "train.warmup"),
    Rule("lr_scheduler_params.warmup_steps", "train.warmup"),
    Rule("optimizer", "train.optimizer", choice(OPTIMIZERS), "its moments are float32 here, never 8 bit"),
    Rule("optimizer_params.weight_decay", "train.weight_decay"),
    Rule("optimizer_params.betas", "train.betas"),
    Rule("optimizer_params.eps", "train.eps"),
    Rule("max_grad_norm", "train.clip"),
    Rule("timestep_type", "train.sigma", _timesteps),
    Rule("content_or_style", "train.sigma", choice({"content": "content", "style": "style"}, "")),
    Rule("dtype", "train.dtype", choice({**DTYPES, "fp16": "bfloat16"})),
    Rule("ema_config.ema_decay", "train.ema", _ema),
    Rule("seed", "run.seed"),
    Rule("disable_sampling", "previews.every", choice({True: 0}, "")),
    Rule("reg_weight", "train.prior_weight"),
    Rule("prompt_dropout_prob", "train.caption_dropout"),
    *only(True, "the transformer is what is trained", "train_unet"),
    *only("flowmatch", "FLUX.2 is trained by flow matching alone", "noise_scheduler"),
    *only("mse", "the loss is the mean squared error", "loss_type"),
    *only("noise", "the loss is that of the velocity", "loss_target"),
    *only(0, "noise levels are drawn from all of them", "min_denoising_steps"),
    *only(999, "noise levels are drawn from all of them", "max_denoising_steps"),
    *only(1000, "noise levels are drawn from all of them", "num_train_timesteps"),
    *only(1, NO_SUCH, "noise_multiplier", "target_noise_multiplier", "signal_correction_noise_scale"),
    *only(1, NO_SUCH, "img_multiplier", "noisy_latent_multiplier", "latent_multiplier", "pred_scaler"),
    *only(1, NO_SUCH, "optimal_noise_pairing_samples", "ema_config.param_multiplier"),
    *unless_off("the text encoder is never trained", "train_text_encoder"),
    *unless_off("set train.sigma: uniform and train.weighting", "linear_timesteps", "linear_timesteps2"),
    *passed_over("ema_config.use_ema", "use_ema", "gradient_checkpointing", "cache_text_embeddings"),
    *passed_over("unload_text_encoder", "skip_first_sample", "force_first_sample", "max_loss_debug"),
    *passed_over("text_encoder_lr", "refiner_lr", "embedding_lr"),
    *passed_over("adapter_lr", "adapter_assist_type", "max_negative_prompts", "next_sample_timesteps"),
    *left_out(KERNELS, "xformers", "sdp", "attention_backend"),
    *left_out("a run goes on by itself from its newest checkpoint", "start_step"),
    *left_out("relay merge makes a base of an adapter", "merge_network_on_save", "merge_network_on_save_strength"),
    *unless_off(NO_SUCH, "diff_output_preservation", "blank_prompt_preservation", "do_differential_guidance"),
    *passed_over("diff_output_preservation_multiplier", "diff_output_preservation_class"),
    *passed_over("blank_prompt_preservation_multiplier", "differential_guidance_scale"),
    *unless_off(NO_SUCH, "min_snr_gamma", "snr_gamma", "learnable_snr_gos", "noise_offset", "weight_jitter"),
    *unless_off(
        NO_SUCH, "random_noise_multiplier", "random_noise_shift", "match_noise_norm", "do_cfg", "do_random_cfg"
    ),
    *unless_off(NO_SUCH, "single_item_batching", "standardize_images", "standardize_latents", "dynamic_noise_offset"),
    *unless_off(NO_SUCH, "correct_pred_norm", "t0_loss_target", "do_fft_loss", "do_prior_divergence", "free_u"),
    *unless_off(NO_SUCH, "inverted_mask_prior", "do_guidance_loss", "do_blank_stabilization", "max_loss"),
    *unless_off(NO_SUCH, "force_consistent_noise", "blended_blur_noise", "target_norm_std", "ema_config.use_feedback"),
    *unless_off(NO_SUCH, "do_paramiter_swapping", "adapter_assist_name_or_path", "short_and_long_captions"),
    *unless_off(NO_SUCH, "latent_feature_extractor_path", "diffusion_feature_extractor_path", "negative_prompt"),
    *unless_off(NO_SUCH, "train_turbo", "do_signal_correction_noise", "do_batch_noise_correction"),
    *unless_off(NO_SUCH, "do_signal_amplification", "adaptive_scaling_factor", "prompt_saturation_chance"),
    *only(1, "one transformer, no stages", "switch_boundary_every"),
    *passed_over(*_SATELLITES),
    *left_out("validation.fraction holds a share of the data out", "validation_config", "validation_config.*"),
    *left_out("train.guidance is what a guidance-distilled model is told", "bypass_guidance_embedding"),
)
MODEL = under(
    "model",
    Rule("name_or_path", "model.path"),
    Rule("arch", "model.name", choice({**_ARCHITECTURES}, _OTHER_MODELS)),
    Rule("vae_path", "model.vae"),
    Rule("te_name_or_path", "model.text_encoder"),
    Rule("model_paths.text_encoder", "model.text_encoder"),
    Rule("model_paths.vae", "model.vae"),
    Rule("quantize", "memory.bits", choice({**_BITS}), "affine groups here"),
    Rule("quantize_te", "encode.bits", choice({**_BITS}), "affine groups here"),
    Rule("lora_path", "lora.init"),
    *only("qfloat8", "say memory.bits: 8, 6 or 4", "qtype"),
    *only("qfloat8", "say encode.bits: 8, 6 or 4", "qtype_te"),
    *unless_off(BUDGET, "low_vram", "layer_offloading", "auto_memory", "split_model_over_gpus"),
    *passed_over("layer_offloading_transformer_percent", "layer_offloading_text_encoder_percent"),
    *passed_over("split_model_other_module_param_count_scale", "vae_device", "te_device"),
    *left_out(_ARITHMETIC, "dtype", "vae_dtype", "te_dtype", "text_encoder_bits"),
    *unless_off("quantized weights stay as they are", "accuracy_recovery_adapter", "quantize_kwargs"),
    *unless_off(KERNELS, "compile", "block_compile", "attn_masking"),
    *passed_over("compile_mode", "compile_fullgraph", "compile_dynamic", "cache_size_limit"),
    *passed_over("is_flux", "refiner_start_at", "use_text_encoder_1"),
    *passed_over("use_text_encoder_2", "latent_space_version", "extras_name_or_path", "unet_sample_size"),
    *unless_off("references keep their own area budget", "model_kwargs.match_target_res"),
    *left_out("another tool's switch", "model_kwargs.*"),
    *unless_off(_OTHER_MODELS, *(f"is_{name}" for name in ("v2", "xl", "pixart", "pixart_sigma", "auraflow"))),
    *unless_off(_OTHER_MODELS, *(f"is_{name}" for name in ("v3", "lumina2", "ssd", "vega", "v_pred"))),
    *unless_off(_OTHER_MODELS, "experimental_xl", "unet_path", "refiner_name_or_path", "use_flux_cfg", "in_context"),
    *left_out("write lora.targets and lora.exclude", "only_if_contains", "ignore_if_contains"),
    *unless_off("a base model needs no adapter to be trained", "assistant_lora_path", "inference_lora_path"),
    *unless_off("a base model needs no adapter to be trained", "unconditional_lora_path"),
)
SAVE = under(
    "save",
    Rule("dtype", "save.dtype", choice({**DTYPES})),
    Rule("save_every", "save.every"),
    Rule("max_step_saves_to_keep", "save.keep"),
    *only("diffusers", "the adapter has diffusers' names; `relay export` has others", "save_format"),
    *unless_off(NO_UPLOAD, "push_to_hub"),
    *passed_over("hf_repo_id", "hf_private"),
)
SAMPLE = under(
    "sample",
    Rule("sample_every", "previews.every"),
    Rule("width", "previews.size", size("width", "height")),
    Rule("height", "previews.size", size("width", "height")),
    Rule("seed", "previews.seed"),
    Rule("guidance_scale", "previews.guidance"),
    Rule("sample_steps", "previews.steps"),
    *passed_over("sampler", "prompts", "samples", "neg", "walk_seed", "sample_start_step", "format"),
    *passed_over("adapter_conditioning_scale", "refiner_start_at", "extra_values", "fps"),
    *only(1, PICTURES_ONLY, "num_frames"),
    *only(1, "previews are drawn at full strength; relay sample has --scale", "network_multiplier"),
    *unless_off("guidance is written out plainly", "guidance_rescale", "do_cfg_norm"),
)
PROCESS = (
    Rule("training_folder", "run.dir", remark="the run folder is run.dir/run.name"),
    Rule("training_seed", "run.seed"),
    Rule("type", "", _trains),
    *passed_over("device", "performance_log_every", "sqlite_db_path", "trigger_word", "log_dir", "torch_profiler"),
    *left_out("metrics lie in the run folder", "logging.*"),
    *left_out(NO_SUCH, "adapter", "adapter.*", "decorator", "decorator.*", "embedding", "embedding.*", "slider.*"),
    *left_out(NO_SUCH, "do_lorm", "guidance", "guidance.*", "first_sample", "first_sample.*"),
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
