"""Numbers at size: one double and one single block of dev's width, ours and diffusers' in bfloat16 against float32.

The reference runs in a process of its own and leaves its weights, inputs and float32 results in a folder.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from bench.gpu import models, parent
from bench.gpu.cases import GIB

from flux2_relay.stages.train import lora
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.objective import Batch, add_noise
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import from_tensors, image_ids, tensor_shapes, text_ids
from flux2_relay.stages.weights import open_tensors

SIGMA = 0.5


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Relative L2 errors; `ratio` is the greatest of ours over theirs, of the velocity and of every gradient."""
    is_tiny = settings.get("tiny", False)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(settings["files"] or aside)
        folder.mkdir(parents=True, exist_ok=True)
        theirs = _reference(folder, settings["pixels"], is_tiny)
        ours = _ours(folder, settings["pixels"], is_tiny)
    ratios = {name: ours[name] / theirs[name] for name in theirs}
    velocity, gradients = ratios.pop("velocity"), list(ratios.values())
    worst = max(ratios, key=lambda name: ratios[name])
    return {
        "ratio": round(max(velocity, max(gradients)), 3),
        "how": f"error against float32, ours and diffusers': velocity {ours['velocity']:.2e} and "
        f"{theirs['velocity']:.2e}; {len(gradients)} gradients, ours over theirs {median(gradients):.2f} in the "
        f"median, {max(gradients):.2f} at most ({worst})",
        "errors": {name: [float(f"{ours[name]:.3e}"), float(f"{theirs[name]:.3e}")] for name in theirs},
        "peak_gib": round(mx.get_peak_memory() / GIB, 3),
    }


def _reference(folder: Path, pixels: tuple[int, int], is_tiny: bool) -> dict[str, float]:
    here = Path(__file__).resolve()
    command = [sys.executable, "-W", "ignore", str(here.with_name("at_size_reference.py")), str(folder)]
    command += [*map(str, pixels), "tiny" if is_tiny else "full"]
    path = os.pathsep.join(filter(None, [str(here.parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **parent.named(), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the reference failed: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _ours(folder: Path, pixels: tuple[int, int], is_tiny: bool) -> dict[str, float]:
    """Velocity and gradients of ours in bfloat16 -> their errors."""
    spec = replace(models.transformer_spec("dev", is_tiny), double_blocks=1, single_blocks=1)
    tensors = open_tensors(folder / "weights.safetensors")
    tensors.check(tensor_shapes(spec))
    model = from_tensors(tensors, spec, 16)
    lora.attach(model, LoraOptions(targets="attention"), seed=0)
    lora.load(model, _read(folder / "adapter.safetensors"))
    values, exact = _read(folder / "inputs.safetensors"), _read(folder / "exact.safetensors")
    batch = Batch(
        latents=values["latents"],
        context=values["context"],
        latent_ids=image_ids(*(side // 16 for side in pixels)),
        text_ids=text_ids(values["context"].shape[1]),
    )
    sigma, guidance = mx.array([SIGMA]), mx.ones(1)
    _, found = loss_and_gradients(model, batch, sigma, values["noise"], guidance)
    model.run = model.pieces
    noisy = add_noise(batch.latents, values["noise"], sigma)
    found["velocity"] = model(noisy, batch.context, sigma, guidance, batch.latent_ids, batch.text_ids)
    return {name: _error(found[name], value) for name, value in exact.items()}


def _read(file: Path) -> dict[str, mx.array]:
    values = mx.load(str(file))
    assert isinstance(values, dict)
    return values


def _error(found: mx.array, exact: mx.array) -> float:
    """Relative L2."""
    difference = found.astype(mx.float32) - exact
    return math.sqrt(float(mx.sum(difference**2)) / float(mx.sum(exact**2)))
