"""`relay import` from musubi-tuner: the data set's TOML, and the flags of its training script."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2_relay.pipeline.import_flags import put_prompts
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
    NO_UPLOAD,
    OPTIMIZERS,
    PICTURES_ONLY,
    SCHEDULES,
    choice,
    put_epochs,
    rectangle,
)

_EIGHT_BIT = choice({True: 8})
_FP8 = "fp8 there, 8 bit in groups here"
_OWN_BUDGET = "references keep their own area budget"
_FOOTPRINT = "always done here: gradients are computed block by block"
_SIGMA = {"flux2_shift": "flux2_shift", "uniform": "uniform", "sigmoid": "logit_normal", "shift": "shift"}
_NETWORKS = {"networks.lora_flux_2": "lora", "networks.lora_flux2": "lora", "networks.lokr": "lokr"}


def _folder_of_shards(value: object, _: Tree) -> object:
    """The first of several files stands for all of them there; here their folder does."""
    path = Path(str(value))
    return str(path.parent) if re.search(r"\d+-of-\d+", path.name) else str(value)


def _warmup(value: object, _: Tree) -> object:
    if isinstance(value, float) and 0 < value < 1:
        raise NotCarried("train.warmup counts steps, not a share of the run")
    return value


def _several(value: object) -> list[str]:
    """The values of a flag that takes several."""
    return [str(word) for word in (value if isinstance(value, list) else [value])]


def _put_network_args(value: object, is_lokr: bool, carried: Carried) -> None:
    """Of LoKr its factor; what else stands there names modules as that tool does."""
    for word in _several(value):
        name, _, number = word.partition("=")
        if is_lokr and name == "factor" and number.lstrip("-").isdigit():
            carried.put(
                "lora.factor", "auto" if int(number) < 0 else int(number), "musubi-tuner: factor", "network_args"
            )
        else:
            carried.leave("network_args", word, "module names are others here; write patterns into lora.targets")


DATASETS = under(
    "datasets.*",
    Rule("image_directory", "data.*.path"),
    Rule("image_jsonl_file", "data.*.path"),
    Rule("resolution", "data.*.resolutions", rectangle, "an area budget here, buckets follow from it"),
    Rule("num_repeats", "data.*.repeats"),
    Rule("bucket_no_upscale", "data.*.upscale", lambda value, _: not value, "the opposite of it"),
    Rule("control_directory", "data.*.references", lambda value, _: [str(value)]),
    Rule("batch_size", "train.batch", remark="one for all data here"),
    *only(".txt", "captions are read from .txt files: rename them", "caption_extension"),
    *only(True, "pictures are always put in buckets of their shape", "enable_bucket"),
    *left_out("the store (cache.path) holds the entries of all data", "cache_directory"),
    *left_out(_OWN_BUDGET, "control_resolution", "no_resize_control", "flux_kontext_no_resize_control"),
    *left_out(_OWN_BUDGET, "qwen_image_edit_control_resolution", "qwen_image_edit_no_resize_control"),
    *left_out(PICTURES_ONLY, "video_directory", "video_jsonl_file", "target_frames", "frame_extraction"),
    *left_out(PICTURES_ONLY, "frame_stride", "frame_sample", "max_frames", "source_fps", "fp_latent_window_size"),
    *left_out(PICTURES_ONLY, "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"),
    *unless_off("a picture has one target", "multiple_target"),
    *unless_off("`relay plan` says what is wrong with data", "debug_dataset"),
)
MODEL = (
    Rule("dit", "model.path"),
    Rule("vae", "model.vae"),
    Rule("text_encoder", "model.text_encoder", _folder_of_shards),
    Rule("model_version", "model.name"),
    Rule("mixed_precision", "train.dtype", choice({"bf16": "bfloat16", "no": "float32"}, "bfloat16 or float32 here")),
    Rule("fp8_base", "memory.bits", _EIGHT_BIT, _FP8),
    Rule("fp8_scaled", "memory.bits", _EIGHT_BIT, _FP8),
    Rule("fp8_text_encoder", "encode.bits", _EIGHT_BIT, _FP8),
    Rule("fp8_t5", "encode.bits", _EIGHT_BIT, _FP8),
    *left_out(BUDGET, "blocks_to_swap", "use_pinned_memory_for_block_swap", "img_in_txt_in_offloading"),
    *left_out(BUDGET, "block_swap_h2d_only", "block_swap_ring_size", "disable_numpy_memmap"),
    *left_out("vae and encoder compute in float32 and at encode.bits", "vae_dtype", "text_encoder_dtype"),
    *left_out("train.dtype and memory.bits decide the arithmetic", "full_bf16", "full_fp16", "dit_dtype"),
)
NETWORK = (
    Rule("network_module", "lora.kind", choice({**_NETWORKS}, "lora.kind is lora, dora or lokr")),
    Rule("network_dim", "lora.rank"),
    Rule("network_alpha", "lora.alpha"),
    Rule("network_dropout", "lora.dropout"),
    Rule("network_weights", "lora.init"),
    *passed_over("network_args"),
    *unless_off("lora.rank has to be said; that file's is in its shapes", "dim_from_weights"),
    *left_out("make a base of them first: relay merge", "base_weights", "base_weights_multiplier"),
    *left_out("there is no such limit on a LoRA's norm", "scale_weight_norms"),
)
TRAIN = (
    Rule("learning_rate", "train.lr"),
    Rule("lr_scheduler", "train.schedule", choice(SCHEDULES)),
    Rule("lr_warmup_steps", "train.warmup", _warmup),
    Rule("max_train_steps", "train.steps"),
    Rule("gradient_accumulation_steps", "train.accumulate"),
    Rule("max_grad_norm", "train.clip"),
    Rule("optimizer_type", "train.optimizer", choice(OPTIMIZERS), "its moments are float32 here, never 8 bit"),
    Rule("timestep_sampling", "train.sigma", choice({**_SIGMA}, "this distribution of noise levels is not here")),
    Rule("discrete_flow_shift", "train.sigma_shift", remark="obeyed with `sigma: shift` alone"),
    Rule("weighting_scheme", "train.weighting", choice({"none": "none"}, "weightings here are none, bell, weighted")),
    Rule("guidance_scale", "train.guidance"),
    *passed_over("max_train_epochs"),
    *left_out("set train.sigma: shift and train.sigma_shift", "flow_shift"),
    *left_out("set train.betas, train.eps and train.weight_decay instead", "optimizer_args"),
    *left_out("train.schedule runs once over train.steps", "lr_decay_steps", "lr_scheduler_num_cycles"),
    *left_out("train.schedule is constant, linear or cosine", "lr_scheduler_power", "lr_scheduler_timescale"),
    *left_out("train.schedule is constant, linear or cosine", "lr_scheduler_type", "lr_scheduler_args"),
    *left_out("train.schedule ends at zero", "lr_scheduler_min_lr_ratio"),
    *left_out("set train.sigma: logit_normal; its width is fixed", "sigmoid_scale", "logit_mean", "logit_std"),
    *left_out("noise levels are drawn from all of them", "min_timestep", "max_timestep", "num_timestep_buckets"),
    *left_out("noise levels are drawn from all of them", "preserve_distribution_shape", "mode_scale"),
    *left_out(_FOOTPRINT, "gradient_checkpointing", "gradient_checkpointing_cpu_offload"),
    *left_out(KERNELS, "sdpa", "flash_attn", "flash3", "sage_attn", "xformers", "split_attn", "cuda_allow_tf32"),
    *left_out(KERNELS, "compile", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph"),
    *left_out(KERNELS, "compile_cache_size_limit", "cuda_cudnn_benchmark", "dynamo_backend", "dynamo_mode"),
    *left_out(KERNELS, "dynamo_fullgraph", "dynamo_dynamic"),
    *left_out("relay train --hosts trains on several", "ddp_timeout", "ddp_gradient_as_bucket_view"),
    *left_out("relay train --hosts trains on several", "ddp_static_graph", "num_processes", "num_machines"),
    *left_out("reading ahead needs no setting here", "max_data_loader_n_workers", "persistent_data_loader_workers"),
    *left_out("reading ahead needs no setting here", "num_cpu_threads_per_process"),
)
RUN = (
    Rule("output_name", "run.name"),
    Rule("output_dir", "run.dir", remark="the run folder is run.dir/run.name"),
    Rule("seed", "run.seed"),
    Rule("save_every_n_steps", "save.every"),
    Rule("save_precision", "save.dtype", choice({**DTYPES})),
    Rule("sample_every_n_steps", "previews.every"),
    Rule("log_with", "log.tensorboard", choice({"tensorboard": True, "all": True}, "only TensorBoard's files")),
    *passed_over("dataset_config", "sample_prompts", "sample_at_first", "config_file"),
    *passed_over("save_state", "save_state_on_train_end", "show_timesteps", "no_metadata"),
    *left_out("save.every counts steps, previews.every too", "save_every_n_epochs", "sample_every_n_epochs"),
    *left_out("save.keep counts checkpoints", "save_last_n_steps", "save_last_n_epochs"),
    *left_out("save.keep counts checkpoints", "save_last_n_steps_state", "save_last_n_epochs_state"),
    *left_out("metrics lie in the run folder", "logging_dir", "log_prefix", "log_tracker_name", "wandb_run_name"),
    *left_out("metrics lie in the run folder", "log_tracker_config", "wandb_api_key", "log_config"),
    *left_out("a run goes on by itself from its newest checkpoint", "resume", "resume_from_huggingface"),
    *left_out("an adapter's file says by itself how it was made", "training_comment", "metadata_title"),
    *left_out("an adapter's file says by itself how it was made", "metadata_author", "metadata_description"),
    *left_out("an adapter's file says by itself how it was made", "metadata_license", "metadata_tags"),
    *left_out("an adapter's file says by itself how it was made", "metadata_reso", "metadata_arch"),
    *left_out(NO_UPLOAD, "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo"),
    *left_out(NO_UPLOAD, "huggingface_token", "huggingface_repo_visibility", "save_state_to_huggingface"),
    *left_out(NO_UPLOAD, "async_upload"),
)
FLAGS = (*MODEL, *NETWORK, *TRAIN, *RUN)


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
    if "network_args" in flags:
        _put_network_args(flags["network_args"], flags.get("network_module") == "networks.lokr", carried)
    if "sample_prompts" in flags:
        put_prompts(Path(str(flags["sample_prompts"])), carried)


def finish(flags: Mapping[str, object], carried: Carried) -> None:
    """What needs flags and data together."""
    if "max_train_epochs" in flags:
        put_epochs(carried, "max_train_epochs", flags["max_train_epochs"])
