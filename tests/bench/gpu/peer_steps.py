"""Training steps of the peer, with gradient checkpointing or without."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from bench.gpu import peer_model

WARM_UP = 2


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure -> the figures of one case."""
    is_tiny = settings.get("tiny", False)
    config = peer_model.config(settings["model"], is_tiny)
    started = time.perf_counter()
    model = peer_model.make(config)
    if settings["checkpointed"]:
        model.enable_gradient_checkpointing()
    factors = list(peer_model.adapt(model).values())
    model.train()
    peer_model.synchronize()
    load = time.perf_counter() - started
    rows = peer_model.TINY_TEXT_ROWS if is_tiny else peer_model.TEXT_ROWS
    item = peer_model.Item(config, settings["pixels"], rows, torch.bfloat16)
    update = torch.optim.AdamW(factors, lr=1e-4)

    def step() -> float:
        begun = time.perf_counter()
        noise, sigma = torch.randn_like(item.latents), torch.rand(1, device=peer_model.DEVICE)
        with torch.autocast(peer_model.DEVICE, torch.bfloat16):
            loss = item.loss(model, noise, sigma)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        update.step()
        update.zero_grad()
        peer_model.synchronize()
        return time.perf_counter() - begun

    first = step()
    for _ in range(settings.get("warm_up", WARM_UP) - 1):
        step()
    peer_model.peak_gib(reset=True)
    seconds = [step() for _ in range(settings["steps"])]
    how = "checkpointed" if settings["checkpointed"] else "nothing recomputed"
    return {
        "how": f"diffusers and peft, bfloat16, {how}",
        "load_seconds": round(load, 2),
        "first_seconds": round(first, 3),
        "seconds": round(median(seconds), 4),
        "all_seconds": [round(value, 4) for value in seconds],
        "peak_gib": round(peer_model.peak_gib(), 3),
        "adapter_parameters": sum(factor.numel() for factor in factors),
    }
