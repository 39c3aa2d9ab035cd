"""The peer of `parallel.py`: diffusers and peft under torch's DistributedDataParallel, gradient checkpointing on."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench.gpu import parallel, parent, peer_model

WARM_UP = 2


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of one rank, then of several -> the figures of one case; none where there are too few cards."""
    if lacking := parallel.too_few(settings):
        return lacking
    with tempfile.TemporaryDirectory() as folder:
        return parallel.speed(settings, Path(folder), "peer_parallel")


def main() -> None:
    """One rank."""
    parent.end_with_parent()
    settings = json.loads(sys.argv[2])
    is_alone = os.environ["WORLD_SIZE"] == "1"
    if not is_alone:
        torch.distributed.init_process_group("nccl" if peer_model.DEVICE == "cuda" else "gloo")
    config = peer_model.config(settings["model"], settings.get("tiny", False))
    model = peer_model.make(config)
    model.enable_gradient_checkpointing()
    factors = list(peer_model.adapt(model).values())
    model.train()
    trained = model if is_alone else torch.nn.parallel.DistributedDataParallel(model)
    found = measure(trained, factors, config, settings)
    if not is_alone:
        torch.distributed.destroy_process_group()
    print(json.dumps(found), flush=True)


def measure(model: Any, factors: list, config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Warm up, then so many steps -> seconds of the median one, and the peak."""
    is_tiny = settings.get("tiny", False)
    rows = peer_model.TINY_TEXT_ROWS if is_tiny else peer_model.TEXT_ROWS
    item = peer_model.Item(config, tuple(settings["pixels"]), rows, torch.bfloat16)
    update = torch.optim.AdamW(factors, lr=1e-4)
    torch.manual_seed(int(os.environ["RANK"]))
    warm_up, seconds = settings.get("warm_up", WARM_UP), []
    for number in range(warm_up + settings.get("steps", 5)):
        if number == warm_up:
            peer_model.peak_gib(reset=True)
        begun = time.perf_counter()
        noise, sigma = torch.randn_like(item.latents), torch.rand(1, device=peer_model.DEVICE)
        with torch.autocast(peer_model.DEVICE, torch.bfloat16):
            loss = item.loss(model, noise, sigma)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        update.step()
        update.zero_grad()
        peer_model.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {
        "how": "diffusers and peft under DDP, bfloat16, checkpointed",
        "seconds": round(median(seconds[warm_up:]), 4),
        "all_seconds": [round(value, 4) for value in seconds[warm_up:]],
        "peak_gib": round(peer_model.peak_gib(), 3),
        "adapter_parameters": sum(factor.numel() for factor in factors),
    }
