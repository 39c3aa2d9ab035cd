"""Train the nano VAE: pictures in many styles, so that it can show what the transformer has yet to learn.

Letters: N pictures, H W rows and columns.
"""

import math
import time

import torch
from diffusers import AutoencoderKLFlux2
from pictures import FIGURES, Packed, Pen, distances, drawn, flat, lay_out
from recorded import progress, rate, record
from torch.nn import functional

Tensor = torch.Tensor
SIDE = 128
RATE, WARM_UP = 2e-3, 100
KL = 1e-4
"""Weight of the divergence of a latent value from N(0, 1), beside errors of pixel values in [-1, 1]."""


def train_vae(vae: AutoencoderKLFlux2, scenes: Packed, steps: int, batch: int, limit: float) -> dict[str, float]:
    """Train for `steps`, or for `limit` seconds if that is less; gives what was done."""
    device = scenes.radius.device
    generator = torch.Generator(device).manual_seed(1)
    speed = torch.tensor(RATE / WARM_UP, device=device)
    on_gpu = device.type == "cuda"
    weights = list(vae.parameters())
    optimizer = torch.optim.AdamW(weights, speed, (0.9, 0.99), weight_decay=1e-4, fused=on_gpu, capturable=on_gpu)
    pictures = torch.zeros(batch, 3, SIDE, SIDE, device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        (picture_loss(decoded.float(), pictures) + KL * divergence).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    pictures.copy_(any_style(scenes[:batch], SIDE, SIDE, generator))
    run, started, count = record(step, device), time.perf_counter(), 0
    for done in progress(steps, limit):
        speed.fill_(rate(RATE, count, WARM_UP, done))
        index = torch.randint(len(scenes.radius), (batch,), device=device, generator=generator)
        pictures.copy_(any_style(scenes[index], SIDE, SIDE, generator))
        run()
        count += 1
    return {"vae_steps": count, "vae_seconds": time.perf_counter() - started}


def picture_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute and squared error of the values, and absolute error of their differences; most where lines are."""
    across, down = pictures.diff(dim=-1).abs(), pictures.diff(dim=-2).abs()
    steps = functional.pad(across, (0, 1)) + functional.pad(down, (0, 0, 0, 1))
    weight = 1 + 4 * functional.max_pool2d(steps.amax(1, keepdim=True), 5, 1, 2).clamp(max=1)
    error = (decoded - pictures) * weight
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def any_style(packed: Packed, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Scenes [N, 3, H, W] in [-1, 1]: half of them flat, the others with random pens or over soft random colours."""
    device, count = packed.radius.device, len(packed.radius)
    distance = distances(packed, lay_out(packed, height, width, generator), height, width)
    pictures = flat(packed, distance, small_tint(count, device, generator))
    style = torch.rand(count, 1, 1, 1, device=device, generator=generator)
    soft = torch.randn(count, 3, 6, 6, device=device, generator=generator)
    soft = functional.interpolate(soft, (height, width), mode="bicubic")
    soft = torch.where(style > 0.9, soft, 0.3 * soft)
    pictures = torch.where(style > 0.8, (pictures + soft).clamp(-1, 1), pictures)
    pen = drawn(pictures, distance, random_pen(count, device, generator))
    return torch.where((style > 0.5) & (style < 0.92), pen, pictures)


def small_tint(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Shifts of the colours [N, F + 1, 3], too small to change their names."""
    return 0.03 * torch.randn(count, FIGURES + 1, 3, device=device, generator=generator)


def random_pen(count: int, device: torch.device, generator: torch.Generator) -> Pen:
    """Inks of any colour, mostly dark; hatching at any angle, wide and narrow."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, device=device, generator=generator)

    return Pen(
        outline=uniform(0, 4.5),
        hatch=uniform(0.8, 3),
        period=uniform(4.5, 14),
        angle=uniform(0, math.pi),
        ink=torch.where(uniform(0, 1, 1) < 0.7, uniform(-1, -0.6, 3), uniform(-1, 1, 3)),
    )


@torch.no_grad()
def set_statistics(vae: AutoencoderKLFlux2, pictures: Tensor) -> dict[str, float]:
    """Batch-norm mean and variance of the latents of flat pictures, as they will be stored; gives the errors left."""
    latents = patchify(vae.encode(pictures).latent_dist.mode())
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)).bfloat16())
    vae.bn.running_var.copy_(latents.var((0, 2, 3)).bfloat16())
    decoded = from_latents(vae, to_latents(vae, pictures), *pictures.shape[-2:])
    return {
        "vae_l1": (decoded - pictures).abs().mean().item(),
        "vae_psnr": -10 * math.log10((decoded - pictures).square().mean().item() / 4),
        "latent_variance_least": latents.var((0, 2, 3)).min().item(),
        "latent_variance_median": latents.var((0, 2, 3)).median().item(),
    }


def patchify(latents: Tensor) -> Tensor:
    """Latents [N, 32, 2h, 2w] -> [N, 128, h, w], the channel outermost."""
    return functional.pixel_unshuffle(latents, 2)


def to_latents(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> normalised latents [N, H/16 * W/16, 128]."""
    latents = patchify(vae.encode(pictures).latent_dist.mode())
    mean, deviation = _statistics(vae)
    return ((latents - mean) / deviation).flatten(2).transpose(1, 2)


def from_latents(vae: AutoencoderKLFlux2, latents: Tensor, height: int, width: int) -> Tensor:
    """Normalised latents [N, L, 128] -> pictures [N, 3, H, W] in [-1, 1]."""
    mean, deviation = _statistics(vae)
    grid = latents.transpose(1, 2).unflatten(2, (height // 16, width // 16)) * deviation + mean
    return vae.decode(functional.pixel_shuffle(grid, 2)).sample.clamp(-1, 1)


def _statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean[None, :, None, None], deviation[None, :, None, None]
