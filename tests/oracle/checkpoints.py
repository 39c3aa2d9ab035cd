"""Tiny random checkpoints in the real layout, written by the real classes of diffusers and transformers.

Every tensor is random, norms and batch-norm statistics too: fresh modules are full of zeros and ones, which hide
a swapped, missing or doubled factor. Each tensor depends only on (seed, its name, its shape).
"""

import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from oracle import vocabularies
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a tiny checkpoint is."""

    text: dict
    """Arguments of the text encoder's own config."""
    transformer: dict
    """Arguments of Flux2Transformer2DModel; the joint width follows from the text."""
    vae: dict
    """Arguments of AutoencoderKLFlux2."""
    dtype: torch.dtype = torch.float32
    """How weights are stored."""
    shard: str = "10GB"
    """Largest file; small values give several files and an index."""
    tokens: int | None = None
    """Tokens of the tokenizer, where the embedding has rows for more."""
    text_config: dict = field(default_factory=dict)
    """Keys added to text_encoder/config.json, e.g. `flux2_taps`, `flux2_text_length`."""


VAE = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 16}
TEXT = {"vocab_size": 544, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}

# head_dim differs from hidden / heads, as in the real encoders; layers go beyond the last of the real taps.
DEV = Sizes(
    text={**TEXT, "num_hidden_layers": 32, "num_attention_heads": 8, "head_dim": 16},
    transformer={"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32}
    | {"axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": True},
    vae=VAE,
    shard="2MB",
)
KLEIN = Sizes(
    text={**TEXT, "num_hidden_layers": 29, "num_attention_heads": 4, "head_dim": 32},
    transformer={"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64}
    | {"axes_dims_rope": (16, 16, 16, 16), "guidance_embeds": False},
    vae={**VAE, "decoder_block_out_channels": (16, 32, 48, 48)},
)


def dev_like(folder: Path, seed: int, sizes: Sizes = DEV) -> Path:
    """A checkpoint laid out like FLUX.2-dev: Mistral3 with a vision tower, guidance-distilled transformer."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": None, **sizes.text}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}, "tie_word_embeddings": False},
        vision_config={"model_type": "pixtral", "image_size": 28, "patch_size": 14, **vision},
        image_token_index=10,
        tie_word_embeddings=False,
    )
    vocabularies.write_mistral(folder / "tokenizer", sizes.tokens or sizes.text["vocab_size"])
    encoder = Mistral3ForConditionalGeneration(config)
    classes = {"text_encoder": encoder, "tokenizer": ("transformers", "PixtralProcessor")}
    return _write(folder, seed, sizes, classes, {"_class_name": "Flux2Pipeline"})


def klein_like(folder: Path, seed: int, sizes: Sizes = KLEIN, *, distilled: bool = True) -> Path:
    """A checkpoint laid out like FLUX.2-klein: Qwen3, no guidance embedding; `distilled` as in model_index.json."""
    config = Qwen3Config(
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **sizes.text,
    )
    vocabularies.write_qwen(folder / "tokenizer", sizes.tokens or sizes.text["vocab_size"])
    classes = {"text_encoder": Qwen3ForCausalLM(config), "tokenizer": ("transformers", "Qwen2TokenizerFast")}
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
    return _write(folder, seed, sizes, classes, index)


def _write(folder: Path, seed: int, sizes: Sizes, classes: dict, index: dict) -> Path:
    width = 3 * sizes.text["hidden_size"]
    modules = {
        "text_encoder": classes.pop("text_encoder"),
        "transformer": Flux2Transformer2DModel(joint_attention_dim=width, **sizes.transformer),
        "vae": AutoencoderKLFlux2(sample_size=64, **sizes.vae),
    }
    for name, module in modules.items():
        randomise(module, seed)
        torch.nn.Module.to(module, sizes.dtype)  # not diffusers' own `to`, which warns
        module.save_pretrained(folder / name, max_shard_size=sizes.shard)
        classes[name] = (type(module).__module__.split(".")[0], type(module).__name__)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    classes["scheduler"] = ("diffusers", "FlowMatchEulerDiscreteScheduler")
    index = {**index, "_diffusers_version": diffusers.__version__} | dict(sorted(classes.items()))
    _write_json(folder / "model_index.json", index)
    if sizes.text_config:
        path = folder / "text_encoder/config.json"
        _write_json(path, json.loads(path.read_text()) | sizes.text_config)
    return folder


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter and statistic in place, scaled so that activations stay near one."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = np.random.default_rng([seed, zlib.crc32(name.encode())])
            tensor.copy_(torch.from_numpy(_values(name, tuple(tensor.shape), noise)))


def _values(name: str, shape: tuple[int, ...], noise: np.random.Generator) -> np.ndarray:
    normal = noise.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return noise.uniform(0.4, 2.5, shape).astype(np.float32)
    if name.endswith("running_mean"):
        return 0.5 * normal
    if name.endswith("bias"):
        return 0.1 * normal
    if len(shape) == 1:
        return 1 + 0.2 * normal
    if name.endswith("embed_tokens.weight"):
        return np.float32(0.05) * normal
    return np.float32(_gain(name) / np.sqrt(np.prod(shape[1:]))) * normal


GAINS = {
    # What a norm reads first is small, as in trained models: a wrong epsilon would not show on values near one.
    r"(x_embedder|context_embedder|conv_in)\.weight": 0.2,
    r"transformer_blocks.*(to_q|to_k|add_q_proj|add_k_proj)\.weight": 0.3,
    # Calm residual branches: thirty layers must not magnify rounding.
    r"(o_proj|down_proj)\.weight": 0.5,
    # Shifts, scales and gates near one half. (The time embedding stays at gain one: its phases reach 4000, so it
    # magnifies the last bit of a frequency.)
    r"(modulation.*|norm_out)\.linear\.weight": 1.5,
}


def _gain(name: str) -> float:
    """How much a matrix magnifies white noise."""
    return next((gain for pattern, gain in GAINS.items() if re.search(pattern, name)), 1.0)
