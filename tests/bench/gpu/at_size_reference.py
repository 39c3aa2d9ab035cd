"""The reference of `at_size.py`: one double and one single block in diffusers, in float32 and in bfloat16."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bench.gpu import parent, peer_model
from safetensors.torch import save_file

SIGMA = 0.5
"""It and the guidance 1 times 1000 are exact in bfloat16: what diffusers rounds there is no part of the comparison."""


def main(folder: Path, pixels: tuple[int, int], is_tiny: bool) -> dict[str, Any]:
    """Write weights, inputs, adapter and the float32 results to `folder` -> the errors of diffusers in bfloat16."""
    config = peer_model.config("dev", is_tiny, num_layers=1, num_single_layers=1)
    model = peer_model.make(config)
    rows = peer_model.TINY_TEXT_ROWS if is_tiny else peer_model.TEXT_ROWS
    item = peer_model.Item(config, pixels, rows, torch.bfloat16)
    noise = torch.randn_like(item.latents)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    factors = peer_model.adapt(model)
    for name, factor in factors.items():
        factor.data.normal_(std=0.02 if "lora_B" in name else factor.shape[-1] ** -0.5)
    save_file({name: factor.data for name, factor in factors.items()}, folder / "adapter.safetensors")
    inputs = {"latents": item.latents, "context": item.context, "noise": noise}
    save_file(inputs, folder / "inputs.safetensors")
    with torch.autocast(peer_model.DEVICE, torch.bfloat16):
        rounded = results(model, item, noise, factors)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for name in inputs:
        if name != "noise":
            setattr(item, name, inputs[name].float())
    exact = results(model, item, noise.float(), factors)
    save_file(exact, folder / "exact.safetensors")
    return {name: error(rounded[name], value) for name, value in exact.items()}


def results(
    model: Any, item: peer_model.Item, noise: torch.Tensor, factors: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The velocity and the gradient of every factor, float32."""
    sigma = torch.full((1,), SIGMA, device=peer_model.DEVICE)
    at = sigma[:, None, None].to(item.latents.dtype)
    velocity = item.velocity(model, (1 - at) * item.latents + at * noise, sigma)
    loss = ((velocity.float() - (noise - item.latents).float()) ** 2).mean()
    found = torch.autograd.grad(loss, list(factors.values()))
    named = {name: value.float().contiguous() for name, value in zip(factors, found, strict=True)}
    return {"velocity": velocity.detach().float().contiguous()} | named


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2."""
    return float((found - exact).norm() / exact.norm())


if __name__ == "__main__":
    parent.end_with_parent()
    where, height, width, tiny = sys.argv[1:]
    print(json.dumps(main(Path(where), (int(height), int(width)), tiny == "tiny")))
