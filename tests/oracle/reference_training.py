"""The reference side of training: diffusers' transformer with a peft adapter, torch's autograd and AdamW."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig
from tiny.cases import Case

Arrays = dict[str, np.ndarray]


def block_linears(model: Flux2Transformer2DModel) -> list[str]:
    """Path of every linear in both kinds of block."""
    linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name in linears if name.startswith(("transformer_blocks.", "single_transformer_blocks."))]


@contextmanager
def adapted(
    model: Flux2Transformer2DModel, targets: Sequence[str], values: Mapping[str, np.ndarray], alpha: float
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """A peft adapter on `targets` holding `values`; yields its factors by name, and takes it off at the end."""
    rank = next(value.shape[0] for name, value in values.items() if ".lora_A." in name)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False))
    factors = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    try:
        if set(factors) != set(values):
            raise ValueError(f"only on one side: {sorted(set(factors) ^ set(values))}")
        with torch.no_grad():
            for name, parameter in factors.items():
                parameter.copy_(torch.from_numpy(values[name]))
        yield factors
    finally:
        model.unload_lora()


def velocity(model: Flux2Transformer2DModel, case: Case) -> np.ndarray:
    """[B, L, 128], reference rows included."""
    with torch.no_grad():
        return _velocity(model, case, torch.from_numpy(case.latents), case.latent_ids).numpy()


def _velocity(
    model: Flux2Transformer2DModel, case: Case, latents: torch.Tensor, latent_ids: np.ndarray
) -> torch.Tensor:
    return model(
        hidden_states=latents,
        encoder_hidden_states=torch.from_numpy(case.context),
        timestep=torch.from_numpy(case.sigma),
        img_ids=torch.from_numpy(latent_ids),
        txt_ids=torch.from_numpy(case.text_ids),
        guidance=None if case.guidance is None else torch.from_numpy(case.guidance),
        return_dict=False,
    )[0]


def loss(model: Flux2Transformer2DModel, case: Case) -> torch.Tensor:
    """Rectified flow as in diffusers' own training scripts; mask and item weight are plain weighted means."""
    latents, noise, sigma = (torch.from_numpy(x) for x in (case.latents, case.noise, case.sigma[:, None, None]))
    tokens, ids = (1 - sigma) * latents + sigma * noise, case.latent_ids
    if case.references is not None and case.reference_ids is not None:
        tokens = torch.cat([tokens, torch.from_numpy(case.references)], dim=1)
        ids = np.concatenate([ids, case.reference_ids])
    prediction = _velocity(model, case, tokens, ids)[:, : latents.shape[1]]
    of_rows = ((prediction.float() - (noise - latents).float()) ** 2).mean(2)
    mask = torch.ones_like(of_rows) if case.mask is None else torch.from_numpy(case.mask)
    of_items = (mask * of_rows).sum(1) / mask.sum(1)
    return (of_items if case.item_weight is None else of_items * torch.from_numpy(case.item_weight)).mean()


def gradients(
    model: Flux2Transformer2DModel, case: Case, factors: Mapping[str, torch.nn.Parameter]
) -> tuple[float, Arrays]:
    """Loss and the gradient of every factor."""
    value = loss(model, case)
    found = torch.autograd.grad(value, list(factors.values()))
    return value.item(), {name: gradient.numpy() for name, gradient in zip(factors, found, strict=True)}


def train(
    model: Flux2Transformer2DModel, cases: Iterable[Case], factors: Mapping[str, torch.nn.Parameter], options: Mapping
) -> tuple[list[float], Arrays]:
    """A step of AdamW a case, the gradient clipped to norm 1: the losses, and the factors at the end."""
    parameters, losses = list(factors.values()), []
    optimizer = torch.optim.AdamW(parameters, **options)
    for case in cases:
        optimizer.zero_grad()
        value = loss(model, case)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses, {name: parameter.detach().numpy().copy() for name, parameter in factors.items()}
