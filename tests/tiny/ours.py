"""This project's side of every comparison: its entry points in float32, numpy in and out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from tiny.cases import Case

from flux2_relay.stages import spec, vae
from flux2_relay.stages.encode.text import load_text_encoder
from flux2_relay.stages.train import lora, optimizer
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.transformer import Transformer, load_transformer

Arrays = dict[str, np.ndarray]


def context(folder: Path, captions: Sequence[str]) -> np.ndarray:
    """Captions -> [B, T, taps*hidden] float32."""
    encoder = load_text_encoder(folder, spec.from_checkpoint(folder).text, bits=32)
    return np.array(encoder.encode(list(captions)))


def latents(folder: Path, images: np.ndarray) -> np.ndarray:
    """images [B, H, W, 3] -> normalised latents [B, H/16, W/16, 128]."""
    return np.array(vae.load_encoder(folder).encode(mx.array(images)))


def images(folder: Path, latents: np.ndarray) -> np.ndarray:
    """latents [B, H/16, W/16, 128] -> images [B, H, W, 3]."""
    return np.array(vae.load_decoder(folder).decode(mx.array(latents)))


def load(folder: Path) -> Transformer:
    """The transformer of a checkpoint in float32."""
    return load_transformer(folder, spec.from_checkpoint(folder).transformer, bits=32)


def attach(model: Transformer, options: lora.LoraOptions, values: Mapping[str, np.ndarray] | None = None) -> Arrays:
    """Give `model` an adapter, set to `values` where they are given; returns the adapter."""
    lora.attach(model, options, seed=0)
    if values is not None:
        lora.load(model, {name: mx.array(value) for name, value in values.items()})
    return numpy(lora.parameters(model))


def velocity(model: Transformer, case: Case) -> np.ndarray:
    """[B, L, 128], reference rows included."""
    return np.array(model(*tensors(case, "latents", "context", "sigma", "guidance", "latent_ids", "text_ids")))


def gradients(model: Transformer, case: Case) -> tuple[float, Arrays]:
    """Loss and gradients of the attached adapter, block by block."""
    loss, found = loss_and_gradients(model, batch(case), *tensors(case, "sigma", "noise", "guidance"))
    return float(loss), numpy(found)


def batch(case: Case) -> dict[str, mx.array]:
    """What the contract calls a batch; what the case lacks is left out."""
    required = ("latents", "context", "latent_ids", "text_ids")
    optional = ("references", "reference_ids", "mask", "item_weight")
    names = [name for name in required + optional if getattr(case, name) is not None]
    return dict(zip(names, tensors(case, *names), strict=True))


def tensors(case: Case, *names: str) -> list:
    """Fields of a case as MLX arrays; None stays None."""
    values = [getattr(case, name) for name in names]
    return [None if value is None else mx.array(value) for value in values]


def numpy(arrays: Mapping[str, mx.array] | Iterable[tuple[str, mx.array]]) -> Arrays:
    """Named MLX arrays as numpy arrays."""
    return {name: np.array(value) for name, value in dict(arrays).items()}


def train(model: Transformer, cases: Iterable[Case], options: TrainOptions) -> tuple[list[float], Arrays]:
    """An update a case, as the loop of stage two does them: the losses, and the adapter at the end."""
    update, losses = optimizer.Optimizer(options, lora.parameters(model)), []
    for step, case in enumerate(cases):
        loss, found = loss_and_gradients(model, batch(case), *tensors(case, "sigma", "noise", "guidance"))
        found, _ = optimizer.clip(found, options.clip)
        lora.load(model, update.update(lora.parameters(model), found, step))
        losses.append(float(loss))
    return losses, numpy(lora.parameters(model))
