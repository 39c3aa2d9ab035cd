"""Tiny random checkpoints in the real layout, pictures with captions, and a config: without torch, in a second.

They hold what a real folder holds and what encoding does not read (a layer beyond the last tap, a head, a vision
tower), so that reading one is reading any. The layout itself is compared with diffusers in tests/oracle.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import yaml
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from flux2_relay.stages import vae
from flux2_relay.stages.encode import encoder_weights
from flux2_relay.stages.encode.templates import FAMILIES
from flux2_relay.stages.spec import read_text_spec, read_transformer_spec, read_vae_spec
from flux2_relay.stages.train.transformer import tensor_shapes

VOCABULARY = 420
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden / heads, as in the real ones
    "rms_norm_eps": 1e-5,
}
OWN = {"flux2_text_length": 48, "flux2_taps": [1, 2, 3]}
VAE = {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [8, 8, 16, 16],
    "latent_channels": 32,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TRANSFORMER = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 4, 4, 4],
    "joint_attention_dim": 3 * 64,
}
SPECIAL = {
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
}


def write_dev(folder: Path, seed: int = 0) -> Path:
    """Like FLUX.2-dev: Mistral inside a multimodal encoder, a transformer that takes guidance."""
    config = {"text_config": {"model_type": "mistral", **TEXT, "rope_parameters": {"rope_theta": 1e6}}, **OWN}
    return _write(folder, "mistral", config, {**TRANSFORMER, "guidance_embeds": True}, seed)


def write_klein(folder: Path, seed: int = 0) -> Path:
    """Like base Klein: Qwen3, no guidance, so that previews take a negative prompt."""
    config = {"model_type": "qwen3", **TEXT, "rope_theta": 1e6, **OWN}
    return _write(folder, "qwen3", config, {**TRANSFORMER, "guidance_embeds": False}, seed)


def _write(folder: Path, family: str, text: Mapping, transformer: Mapping, seed: int) -> Path:
    for part, config in (("text_encoder", text), ("transformer", transformer), ("vae", VAE)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"is_distilled": False}))
    write_tokenizer(folder / "tokenizer", family)
    spec = read_transformer_spec(folder / "transformer")
    save(folder / "transformer/diffusion_pytorch_model.safetensors", random(tensor_shapes(spec), seed))
    of_vae = read_vae_spec(folder / "vae")
    shapes = vae.encoder_tensor_names(of_vae) | vae.decoder_tensor_names(of_vae)
    save(folder / "vae/diffusion_pytorch_model.safetensors", random(shapes, seed))
    save(folder / "text_encoder/model.safetensors", random(_text_shapes(folder / "text_encoder", family), seed))
    return folder


def _text_shapes(folder: Path, family: str) -> dict[str, tuple[int, ...]]:
    spec = read_text_spec(folder)
    own = encoder_weights.tensor_shapes(spec)
    unused = {
        f"layers.{number}.{name}": shape
        for number in range(spec.taps[-1], spec.layers)
        for name, shape in encoder_weights.layer_shapes(spec).items()
    }
    prefix, tower = (
        ("language_model.model.", {"vision_tower.conv.weight": (4, 4)})
        if family == "mistral"
        else (
            "model.",
            {"lm_head.weight": (8, 64)},
        )
    )
    inside = own | unused | {"norm.weight": (spec.hidden,)}
    return {prefix + name: shape for name, shape in inside.items()} | tower


def random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, mx.array]:
    """Values that keep activations near one; each depends on (seed, its name) alone."""
    return {name: mx.array(_values(name, shape, seed)) for name, shape in shapes.items()}


def _values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = generator.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return 0.5 + normal**2
    if len(shape) == 1:
        return 0.1 * normal if name.endswith(("bias", "running_mean")) else 1 + 0.2 * normal
    return normal / np.float32(np.sqrt(np.prod(shape[1:])))


def save(path: Path, values: Mapping[str, mx.array]) -> None:
    """A safetensors file."""
    mx.save_safetensors(str(path), dict(values))


def write_tokenizer(folder: Path, family: str) -> None:
    """`tokenizer.json` whose words are those of the family's template, bytes for all else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL[family]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    words = [FAMILIES[family].before, FAMILIES[family].after, "a red fox number one, a blue dog number two"]
    tokenizer.train_from_iterator(words, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_pictures(folder: Path, count: int = 5) -> Path:
    """Square and wide pictures in turn, each with its caption: two buckets."""
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (64, 96 if number % 2 else 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red fox number {number}")
    return folder


def write_config(
    path: Path, model: Path, data: Path, changes: Mapping[str, Mapping[str, object]] | None = None
) -> Path:
    """A config whose store and runs lie beside it; `changes` are merged into its sections."""
    config: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "dir": str(path.parent / "runs"), "seed": 3},
        "model": {"path": str(model)},
        "data": {"path": str(data), "resolutions": [64]},
        "encode": {"bits": 32},
        "cache": {"path": str(path.parent / "store.zarr"), "dtype": "float32", "latents_dtype": "float32"},
        "lora": {"rank": 2, "targets": "attention"},
        "train": {"steps": 6, "batch": 2, "lr": 1e-3, "dtype": "float32", "caption_dropout": 0.2},
        "memory": {"bits": 32},
        "save": {"every": 2, "dtype": "float32"},
        "previews": {"every": 6, "prompts": ["a blue dog"], "size": [64, 64], "steps": 2},
    }
    for section, keys in (changes or {}).items():
        config[section] = {**config.get(section, {}), **keys}
    path.write_text(yaml.safe_dump(config))
    return path
