"""The parts of the nano model: FLUX.2-dev's own classes in small, a tokenizer, and the checkpoint folder.

Letters: V vocabulary, H text width.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from scenes import COUNTS, FILLERS, NAMES, PLACES, RELATIONS, SHAPES, SIZES, STYLES, TRIGGERS, plural
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from flux2_relay.stages.encode.templates import FAMILIES

TEMPLATE = FAMILIES["mistral"]
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>"} | {
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
}
"""Ids of the special tokens, the same as in the real tokenizer; ordinary tokens begin at 20."""
CHAT = """{{- bos_token }}{%- for message in messages %}
{%- set name = {"system": "SYSTEM_PROMPT", "user": "INST"}[message.role] %}
{{- "[" ~ name ~ "]" }}{%- for part in message.content %}{{- part.text }}{%- endfor %}{{- "[/" ~ name ~ "]" }}
{%- endfor %}
"""
"""The template as the reference pipeline wants it: a Jinja file."""
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the parts are."""

    transformer: dict = field(
        default_factory=lambda: {
            "num_layers": 1,
            "num_single_layers": 5,
            "num_attention_heads": 6,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 8, 8, 8),
            "mlp_ratio": 2.0,
            "guidance_embeds": True,
        }
    )
    text: dict = field(
        default_factory=lambda: {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        }
    )
    vae: dict = field(
        default_factory=lambda: {
            "block_out_channels": (16, 32, 64, 96),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 128,
        }
    )
    taps: tuple[int, ...] = (1, 2, 3)
    length: int = 64


SMALLEST = Sizes(
    transformer={
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 8, 8, 8),
        "guidance_embeds": True,
    },
    text={**Sizes().text, "hidden_size": 48, "intermediate_size": 64, "head_dim": 16},
    vae={**Sizes().vae, "block_out_channels": (8, 16, 16, 32)},
)
"""For trying out what surrounds the model."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The modules of one nano model."""

    sizes: Sizes
    tokenizer: Tokenizer
    text: Mistral3ForConditionalGeneration
    transformer: Flux2Transformer2DModel
    vae: AutoencoderKLFlux2

    @property
    def language(self) -> torch.nn.Module:
        """The language model inside the multimodal class."""
        return self.text.model.language_model


def build(sizes: Sizes, seed: int) -> Parts:
    """Fresh modules with random weights."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    width = sizes.text["hidden_size"] * len(sizes.taps)
    return Parts(
        sizes=sizes,
        tokenizer=tokenizer,
        text=Mistral3ForConditionalGeneration(text_config(sizes, tokenizer.get_vocab_size())),
        transformer=Flux2Transformer2DModel(joint_attention_dim=width, **sizes.transformer),
        vae=AutoencoderKLFlux2(**sizes.vae),
    )


def text_config(sizes: Sizes, vocabulary: int) -> Mistral3Config:
    """Mistral 3's config around the small language model; the vision tower, which FLUX.2 never uses, is the least."""
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": vocabulary,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "max_position_embeddings": 512,
            **sizes.text,
        },
        vision_config={
            "model_type": "pixtral",
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        image_token_index=10,
        tie_word_embeddings=True,
    )
    config.flux2_taps, config.flux2_text_length = list(sizes.taps), sizes.length
    return config


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE in which every word of the system prompt and of the captions is one token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [SPECIAL.get(number, f"<SPECIAL_{number}>") for number in range(20)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than the corpus gives: merging ends when all its words are whole
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def corpus() -> Iterator[str]:
    """All that must be one token a word, in front of a caption and inside it."""
    rendered = TEMPLATE.before
    yield rendered[rendered.index("]") + 1 : rendered.index("[/SYSTEM_PROMPT]")]
    phrases = [*NAMES, *COUNTS, *PLACES, *RELATIONS, *SHAPES, *SIZES, *FILLERS, *STYLES, *TRIGGERS]
    words = {word for phrase in phrases for word in phrase.split()} | {plural(shape) for shape in SHAPES}
    for word in sorted(words | {"a", "an", "one", "of", "with", "the", "background", "style"}):
        yield word
        yield f" {word}"


def write(parts: Parts, folder: Path) -> None:
    """The checkpoint in the diffusers layout, weights in bfloat16, batch-norm statistics with them."""
    for name in ("transformer", "vae"):
        module = getattr(parts, name)
        torch.nn.Module.to(module, torch.bfloat16)
        module.save_pretrained(folder / name)
    parts.text.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir(exist_ok=True)
    parts.tokenizer.save(str(folder / "tokenizer/tokenizer.json"), pretty=False)
    (folder / "tokenizer/chat_template.jinja").write_text(CHAT, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "PixtralProcessor",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "padding_side": "left",
    }
    write_json(folder / "tokenizer/tokenizer_config.json", settings)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "Flux2Pipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
            "tokenizer": ["transformers", "PixtralProcessor"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
    )
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # the library keeps them from everybody else


def write_json(path: Path, content: dict) -> None:
    """A JSON file as the libraries write theirs."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
