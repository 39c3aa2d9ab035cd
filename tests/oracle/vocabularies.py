"""Tiny tokenizers in the layout of the two real ones: what is special, what is added, and who adds `<s>`.

The ids 0..18 of the Mistral one are the real ones; ordinary tokens start at 20 instead of 1000. The Qwen one keeps
the real order: ordinary tokens first, then the added ones.
"""

import json
from pathlib import Path

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    SYSTEM_MESSAGE,
    "a red fox, sitting on a mossy log in the morning mist, 85mm photograph, shallow depth of field",
    "user assistant user assistant\n\n\n  the quick brown fox jumps over the lazy dog; two foxes, a fox and a den.",
    "Ein Fuchs läuft über die Straße: café, naïve, coöperate. Лиса бежит по снегу. 狐が雪の上を走る。 🦊🦊",
    "def fox(n: int) -> str:\n    return 'fox' * n  # 1234567890",
]

MISTRAL_NAMES = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
}
MISTRAL_SPECIAL = [MISTRAL_NAMES.get(i, f"<SPECIAL_{i}>") for i in range(20)]

# tokenizer.json of Mistral-Small-3.1 carries Llama 3's pattern, that of Qwen3 splits digits one by one.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

MISTRAL_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- set name = "SYSTEM_PROMPT" if message["role"] == "system" else "INST" %}
    {{- "[" + name + "]" }}
    {%- for block in message["content"] %}
        {{- block["text"] }}
    {%- endfor %}
    {{- "[/" + name + "]" }}
{%- endfor %}
"""

QWEN_TEMPLATE = """{%- for message in messages %}
    {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
"""


def write_mistral(folder: Path, size: int) -> None:
    """`tokenizer/` of a dev-like checkpoint with `size` ids in all."""
    tokenizer = _byte_level(LLAMA3_PATTERN, size, MISTRAL_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    _write(
        folder,
        tokenizer,
        MISTRAL_TEMPLATE,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "PixtralProcessor",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "padding_side": "left",
            "model_max_length": 131072,
        },
    )


def write_qwen(folder: Path, size: int) -> None:
    """`tokenizer/` of a Klein-like checkpoint with `size` ids in all."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<think>", "</think>"]
    tokenizer = _byte_level(QWEN_PATTERN, size - len(special) - len(plain), [])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    _write(
        folder,
        tokenizer,
        QWEN_TEMPLATE,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "unk_token": None,
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
            "model_max_length": 131072,
        },
    )


def _byte_level(pattern: str, size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=bool(special)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {size}; ask for fewer")
    return tokenizer


def _write(folder: Path, tokenizer: Tokenizer, template: str, config: dict) -> None:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(template)
