"""Adapter files in diffusers' hands: loaded through the pipeline, and the weights they stand for merged by hand."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from oracle import reference_training
from oracle.reference import Reference
from tiny import cases
from tiny.cases import Case

from flux2_relay.stages.spec import TransformerSpec, read_transformer_spec

Updates = Mapping[str, np.ndarray]
"""Module -> what is added to its weight [out, in], float64."""


def spec_of(reference: Reference) -> TransformerSpec:
    return read_transformer_spec(reference.folder / "transformer")


def fresh(reference: Reference) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel.from_pretrained(reference.folder / "transformer", torch_dtype=torch.float32).eval()


def through_the_pipeline(reference: Reference, path: Path) -> Flux2Transformer2DModel:
    of_class = Flux2KleinPipeline if reference.is_klein else Flux2Pipeline
    pipeline = of_class(None, None, None, None, fresh(reference))
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipeline.transformer


def through_the_model(reference: Reference, path: Path) -> Flux2Transformer2DModel:
    model = fresh(reference)
    model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer")
    return model


def merged(reference: Reference, updates: Updates) -> Flux2Transformer2DModel:
    """The weights with their updates added in float64."""
    model = fresh(reference)
    for name, update in updates.items():
        weight = model.get_parameter(f"{name}.weight")
        weight.data = (weight.data.double() + torch.from_numpy(update)).float()
    return model


def case(reference: Reference) -> Case:
    width, guidance = reference.transformer.config.joint_attention_dim, reference.transformer.config.guidance_embeds
    return cases.draw(width, seed=4, guidance=[3.0, 1.5] if guidance else None)


def error_of_change(actual: np.ndarray, expected: np.ndarray, base: np.ndarray) -> float:
    """Largest error over the largest change that the adapter makes."""
    return float(np.abs(actual - expected).max() / np.abs(expected - base).max())


def outcome(reference: Reference, path: Path, updates: Updates, limit: float) -> str:
    """What diffusers does with a file that stands for `updates`: ok, wrong, loads nothing, or refuses."""
    try:
        loaded = through_the_pipeline(reference, path)
    except ValueError:
        return "refuses"
    if not getattr(loaded, "peft_config", None):
        return "loads nothing"
    given = case(reference)
    base, expected = (
        reference_training.velocity(model, given) for model in (reference.transformer, merged(reference, updates))
    )
    error = error_of_change(reference_training.velocity(loaded, given), expected, base)
    return "ok" if error <= limit else "wrong"
