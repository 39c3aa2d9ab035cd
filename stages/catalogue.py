"""The models that are known by name: their sizes, their text encoders, and where their files are to be had.

Sizes give familiar checkpoints a name (`model.name`) and supply what a single file does not say of itself; no numerics
depend on a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flux2_relay.stages.sizes import TextSpec, TransformerSpec

PartName = Literal["transformer", "text_encoder", "tokenizer", "vae"]


def _klein(hidden_heads: int, double: int, single: int, context: int) -> TransformerSpec:
    return TransformerSpec(
        double_blocks=double,
        single_blocks=single,
        heads=hidden_heads,
        head_dim=128,
        context_width=context,
        guidance=False,
    )


DEV = TransformerSpec(double_blocks=8, single_blocks=48, heads=48, head_dim=128, context_width=15360, guidance=True)
CATALOGUE: Mapping[str, tuple[TransformerSpec, bool]] = {
    "dev": (DEV, False),
    "klein-4b": (_klein(24, 5, 20, 7680), True),
    "klein-9b": (_klein(32, 8, 24, 12288), True),
    "klein-base-4b": (_klein(24, 5, 20, 7680), False),
    "klein-base-9b": (_klein(32, 8, 24, 12288), False),
}
"""Known models: the transformer's spec, and whether the model is distilled."""

_QWEN3_4B = TextSpec(
    family="qwen3",
    layers=36,
    hidden=2560,
    mlp_width=9728,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151936,
    rope_theta=1e6,
    eps=1e-6,
    taps=(9, 18, 27),
    length=512,
)
_MISTRAL = TextSpec(
    family="mistral",
    layers=40,
    hidden=5120,
    mlp_width=32768,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=131072,
    rope_theta=1e9,
    eps=1e-5,
    taps=(10, 20, 30),
    length=512,
)
ENCODERS: Mapping[str, TextSpec] = {
    "Mistral Small 3.2 24B": _MISTRAL,
    "Qwen3 4B": _QWEN3_4B,
    "Qwen3 8B": replace(_QWEN3_4B, hidden=4096, mlp_width=12288),
}
"""Known text encoders. Head size, rotary base, epsilon and taps stand in no tensor's shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a known model is to be had."""

    repository: str
    """A diffusers folder on the Hugging Face hub; BFL's single file lies beside its `transformer` folder."""
    file: str
    """BFL's single file of the transformer."""
    encoder: str
    """ComfyUI's single file of the text encoder."""


SOURCES: Mapping[str, Source] = {
    "dev": Source(
        repository="black-forest-labs/FLUX.2-dev",
        file="flux2-dev.safetensors",
        encoder="mistral_3_small_flux2_bf16.safetensors",
    ),
    "klein-4b": Source(
        repository="black-forest-labs/FLUX.2-klein-4B",
        file="flux-2-klein-4b.safetensors",
        encoder="qwen_3_4b.safetensors",
    ),
    "klein-9b": Source(
        repository="black-forest-labs/FLUX.2-klein-9B",
        file="flux-2-klein-9b.safetensors",
        encoder="qwen_3_8b.safetensors",
    ),
    "klein-base-4b": Source(
        repository="black-forest-labs/FLUX.2-klein-base-4B",
        file="flux-2-klein-base-4b.safetensors",
        encoder="qwen_3_4b.safetensors",
    ),
    "klein-base-9b": Source(
        repository="black-forest-labs/FLUX.2-klein-base-9B",
        file="flux-2-klein-base-9b.safetensors",
        encoder="qwen_3_8b.safetensors",
    ),
}


def download_all(model: str) -> str:
    """The command that downloads a model without the second copy of its transformer that lies beside the first."""
    source = SOURCES[model]
    return f"hf download {source.repository} --exclude {source.file}"


def download(part: PartName, model: str | None) -> str:
    """What to download where a part of a model is missing, in a clause; without a model, of whichever it is."""
    source = SOURCES[model] if model else None
    repository = source.repository if source else "the model's repository"
    alternatives = {
        "transformer": source.file if source else "BFL's single file",
        "text_encoder": f"ComfyUI's {source.encoder}" if source else "a ComfyUI file of the encoder",
        "vae": "ae.safetensors or ComfyUI's flux2-vae.safetensors",
    }
    wanted = "tokenizer/tokenizer.json" if part == "tokenizer" else f"the folder {part}/"
    wanted += f" (or {alternatives[part]})" if part in alternatives else ""
    command = f": hf download {repository} --include '{part}/*'" if source else ""
    return f"download {wanted} of {repository}{command}"
