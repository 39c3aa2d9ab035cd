"""A folder in the layout of diffusers: the small files that say what a model is made of.

Written where a single file, or a folder without its index, was all there was.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.sizes import TransformerSpec

_MADE_WITH = "0.42.1"  # the diffusers whose names these are

_CLASSES: Mapping[bool, Mapping[str, tuple[str, str]]] = {
    True: {
        "text_encoder": ("transformers", "Mistral3ForConditionalGeneration"),
        "tokenizer": ("transformers", "PixtralProcessor"),
    },
    False: {
        "text_encoder": ("transformers", "Qwen3ForCausalLM"),
        "tokenizer": ("transformers", "Qwen2TokenizerFast"),
    },
}
"""Takes guidance? -> the classes of the parts that differ between dev and the Kleins."""
_COMMON = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "transformer": ("diffusers", "Flux2Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLFlux2"),
}

SCHEDULER: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": _MADE_WITH,
    "num_train_timesteps": 1000,
    "shift": 3.0,  # not used where shifting is dynamic, as it is here
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""`scheduler/scheduler_config.json`: the pipelines of FLUX.2 bring their own shift."""


def transformer_config(spec: TransformerSpec) -> dict[str, Any]:
    """The `config.json` of a transformer."""
    return {
        "_class_name": "Flux2Transformer2DModel",
        "_diffusers_version": _MADE_WITH,
        "patch_size": 1,
        "in_channels": spec.channels,
        "out_channels": None,
        "num_layers": spec.double_blocks,
        "num_single_layers": spec.single_blocks,
        "attention_head_dim": spec.head_dim,
        "num_attention_heads": spec.heads,
        "joint_attention_dim": spec.context_width,
        "timestep_guidance_channels": spec.time_channels,
        "mlp_ratio": spec.mlp_ratio,
        "axes_dims_rope": list(spec.rope_axes),
        "rope_theta": spec.rope_theta,
        "eps": spec.eps,
        "guidance_embeds": spec.guidance,
    }


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a folder, empty where there is none."""
    path = folder / "model_index.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object")
    return found


def index_of(spec: TransformerSpec, found: Mapping[str, Any], there: frozenset[str], distilled: bool) -> dict[str, Any]:
    """A `model_index.json`: what was `found`, completed; parts that are not `there` are null, as diffusers has it."""
    classes = {**_COMMON, **_CLASSES[spec.guidance]}
    named = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    base: dict[str, Any] = {
        "_class_name": "Flux2Pipeline" if spec.guidance else "Flux2KleinPipeline",
        "_diffusers_version": _MADE_WITH,
        **({} if spec.guidance else {"is_distilled": distilled}),
    }
    base |= {key: value for key, value in found.items() if not isinstance(value, list)}
    parts = {**classes, **named}
    return base | {name: list(parts[name]) if name in there else [None, None] for name in sorted(parts)}


def parts_of(spec: TransformerSpec, found: Mapping[str, Any]) -> list[str]:
    """The folders that a model has besides its transformer's, by its index or, without one, by what FLUX.2 has."""
    named = {name for name, value in found.items() if isinstance(value, list)}
    return sorted((named or {*_COMMON, *_CLASSES[spec.guidance]}) - {"transformer"})
