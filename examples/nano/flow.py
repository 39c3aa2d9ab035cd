"""Train the nano transformer, and the text encoder with it, by rectified flow; draw pictures with diffusers' schedule.

Letters: N pictures, L image tokens, T text rows, C context channels.
"""

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch._dynamo
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from parts import TEMPLATE, Parts
from pictures import distances, drawn, flat, lay_out, pack, pens
from recorded import progress, rate, record
from scenes import Scene, draw_caption, draw_style
from torch.nn import functional
from vae import from_latents, small_tint, to_latents

Tensor = torch.Tensor
BUCKETS = {(128, 128): 0.7, (96, 160): 0.15, (160, 96): 0.15}
"""Height and width of the base's pictures -> share of them."""
RATE, WARM_UP, DROPOUT, EMA = 2e-3, 200, 0.1, 0.999
MOST_GUIDANCE = 4.0
SHIFT = 3.0
GUIDED_RATE = 5e-4
"""Learning rate of the second phase, in which guidance gets its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """All pictures of one size: latents [N, L, 128] float16 and token ids [N, T]."""

    size: tuple[int, int]
    latents: Tensor
    ids: Tensor


@torch.no_grad()
def make_bucket(parts: Parts, scenes: Sequence[Scene], size: tuple[int, int], device: str) -> Bucket:
    """Draw, caption and encode scenes, some of them in styles."""
    generator = torch.Generator(device).manual_seed(sum(size))
    rng = random.Random(sum(size))
    styles = [draw_style(rng) for _ in scenes]
    packed, pen = pack(scenes).to(device), pens(styles).to(device)
    latents = []
    for start in range(0, len(scenes), 512):
        rows = slice(start, start + 512)
        part = packed[rows]
        distance = distances(part, lay_out(part, *size, generator), *size)
        picture = flat(part, distance, small_tint(len(part.radius), torch.device(device), generator))
        latents.append(to_latents(parts.vae, drawn(picture, distance, pen[rows])).half())
    captions = [draw_caption(scene, style, rng) for scene, style in zip(scenes, styles, strict=True)]
    return Bucket(size=size, latents=torch.cat(latents), ids=token_ids(parts, captions).to(device))


def token_ids(parts: Parts, captions: Sequence[str]) -> Tensor:
    """Rendered captions as ids [N, T], padded on the left."""
    rows = parts.tokenizer.encode_batch([TEMPLATE.render(c) for c in captions], add_special_tokens=False)
    table = np.full((len(rows), parts.sizes.length), parts.tokenizer.token_to_id(TEMPLATE.pad))
    for place, row in zip(table, rows, strict=True):
        ids = row.ids[: len(place)]
        place[len(place) - len(ids) :] = ids
    return torch.from_numpy(table)


def context(parts: Parts, ids: Tensor) -> Tensor:
    """Ids [N, T] -> context [N, T, C]: the taps side by side; a pad attends to nothing, so all pads are one row."""
    number, table = parts.tokenizer.token_to_id(TEMPLATE.pad), parts.language.embed_tokens.weight
    places = torch.arange(ids.shape[1], device=ids.device)
    real = ids != number
    sees = (places[:, None] >= places) & real[:, None, None] | (places[:, None] == places)
    # A product instead of a look-up: its gradient is the same and can be recorded.
    hidden = (ids[..., None] == torch.arange(len(table), device=ids.device)).to(table.dtype) @ table
    turns = parts.language.rotary_emb(hidden, position_ids=places[None])
    taps = []
    for count, layer in enumerate(parts.language.layers[: parts.sizes.taps[-1]], start=1):
        hidden = layer(hidden, attention_mask=sees, position_ids=places[None], position_embeddings=turns)
        taps += [hidden] if count in parts.sizes.taps else []
    return torch.where(real[..., None], torch.cat(taps, -1), pad_row(parts, number))


def pad_row(parts: Parts, number: int) -> Tensor:
    """The context [C] of a pad with id `number`: in every layer the MLP alone adds to it."""
    row, taps = parts.language.embed_tokens.weight[number], []
    for count, layer in enumerate(parts.language.layers[: parts.sizes.taps[-1]], start=1):
        row = row + layer.mlp(layer.post_attention_layernorm(row))
        taps += [row] if count in parts.sizes.taps else []
    return torch.cat(taps, -1)


def velocity(
    parts: Parts, latents: Tensor, text: Tensor, sigma: Tensor, guidance: Tensor, size: tuple[int, int]
) -> Tensor:
    """The transformer's prediction [N, L, 128] of noise - data."""
    rows, columns = size[0] // 16, size[1] // 16
    device = latents.device
    image_ids = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, rows, columns, 1)))
    text_ids = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, 1, 1, text.shape[1])))
    return parts.transformer(
        hidden_states=latents,
        encoder_hidden_states=text,
        timestep=sigma,
        guidance=guidance,
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [N]: seven tenths logit-normal, moved towards noise, where figures form; the others uniform."""
    device = generator.device
    normal = torch.sigmoid(torch.randn(count, device=device, generator=generator))
    shifted = SHIFT * normal / (1 + (SHIFT - 1) * normal)
    uniform = torch.rand(count, device=device, generator=generator)
    return torch.where(torch.rand(count, device=device, generator=generator) < 0.7, shifted, uniform)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step trains on, in tensors that stay where they are."""

    latents: Tensor  # [N, L, 128]
    noise: Tensor  # [N, L, 128]
    ids: Tensor  # [N, T]
    sigma: Tensor  # [N]
    guidance: Tensor  # [N]

    @classmethod
    def of(cls, bucket: Bucket, count: int) -> "Batch":
        """Room for `count` pictures of a bucket."""
        latents, level = bucket.latents[:1].float().expand(count, -1, -1), bucket.latents.new_ones(count).float()
        return cls(
            latents=latents.clone(),
            noise=torch.randn_like(latents),
            ids=bucket.ids[:1].expand(count, -1).clone(),
            sigma=level.clone() / 2,
            guidance=level.clone(),
        )

    def fill(self, bucket: Bucket, empty: Tensor, generator: torch.Generator) -> None:
        """Take random pictures of the bucket, noise levels, guidance, and for some the empty caption [1, T]."""
        count, device = len(self.sigma), generator.device
        index = torch.randint(len(bucket.latents), (count,), device=device, generator=generator)
        dropped = torch.rand(count, 1, device=device, generator=generator) < DROPOUT
        self.latents.copy_(bucket.latents[index])
        self.ids.copy_(torch.where(dropped, empty, bucket.ids[index]))
        self.noise.normal_(generator=generator)
        self.sigma.copy_(draw_sigma(count, generator))
        self.guidance.copy_(1 + (MOST_GUIDANCE - 1) * torch.rand(count, device=device, generator=generator))


def flow_loss(parts: Parts, batch: Batch, size: tuple[int, int], teacher: "Teacher | None") -> Tensor:
    """Mean squared error of the velocity: from data to noise, or what a teacher says."""
    noisy = torch.lerp(batch.latents, batch.noise, batch.sigma[:, None, None])
    predicted = velocity(parts, noisy, context(parts, batch.ids), batch.sigma, batch.guidance, size)
    target = batch.noise - batch.latents if teacher is None else teacher.velocity(noisy, batch, size)
    return functional.mse_loss(predicted.float(), target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A trained model whose classifier-free guidance another learns to give in one pass, as FLUX.2-dev does."""

    parts: Parts
    empty: Tensor  # ids [1, T] of the empty caption

    @torch.no_grad()
    def velocity(self, noisy: Tensor, batch: Batch, size: tuple[int, int]) -> Tensor:
        """Guided velocity [N, L, 128] float32, each picture by its own guidance."""
        one = torch.ones_like(batch.guidance)
        told, untold = (
            velocity(self.parts, noisy, context(self.parts, ids), batch.sigma, one, size).float()
            for ids in (batch.ids, self.empty.expand_as(batch.ids))
        )
        return torch.lerp(untold, told, batch.guidance[:, None, None])


def half_copy(parts: Parts, dtype: torch.dtype) -> Parts:
    """The modules that are trained, in a smaller type; noise levels, guidance and angles stay exact."""
    transformer, text = copy.deepcopy(parts.transformer), copy.deepcopy(parts.text)
    half = replace(parts, transformer=torch.nn.Module.to(transformer, dtype), text=text.to(dtype))
    half.language.rotary_emb = parts.language.rotary_emb
    embedders = transformer.time_guidance_embed
    for module in (transformer.x_embedder, embedders.timestep_embedder, embedders.guidance_embedder):
        module.register_forward_pre_hook(lambda _, given: (given[0].to(dtype), *given[1:]))
    if dtype != torch.float32:  # on a GPU: small blocks are bound by reading and writing between their operations
        torch._dynamo.config.recompile_limit = 64  # layers of one kind, with and without gradients, two sizes
        for layer in (*half.language.layers, *transformer.transformer_blocks, *transformer.single_transformer_blocks):
            layer.compile(dynamic=False)
    return half


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One phase of training: by `steps` or by `limit` seconds, whichever ends first."""

    name: str
    steps: int
    batch: int
    limit: float
    guided: bool
    seed: int


def trained(parts: Parts) -> list[torch.nn.Parameter]:
    """The weights that the loss depends on."""
    layers = parts.language.layers[: parts.sizes.taps[-1]]
    return [*parts.transformer.parameters(), *parts.language.embed_tokens.parameters(), *layers.parameters()]


class Trainer:
    """Steps in half precision on weights kept in single precision, and a running mean of them."""

    def __init__(self, parts: Parts, device: torch.device, empty: Tensor, guided: bool) -> None:
        """The weights of `parts` are what is trained; `guided` by what they are now; `empty` are ids."""
        on_gpu = device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.half = half_copy(parts, dtype)
        self.teacher = Teacher(parts=half_copy(parts, dtype), empty=empty) if guided else None
        self.weights, self.halves = trained(parts), trained(self.half)
        self.means = [weight.detach().clone() for weight in self.weights]
        self.peak = GUIDED_RATE if guided else RATE
        self.rate, self.total = torch.tensor(self.peak / WARM_UP, device=device), torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.weights, self.rate, (0.9, 0.99), weight_decay=0, fused=on_gpu, capturable=on_gpu
        )
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)

    def step(self, batch: Batch, size: tuple[int, int]) -> None:
        """One update; the loss is added to `total`."""
        for half in self.halves:
            half.grad = None
        loss = flow_loss(self.half, batch, size, self.teacher)
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_([w.grad for w in self.weights], [h.grad for h in self.halves])
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            torch._foreach_copy_(self.halves, self.weights)
            torch._foreach_lerp_(self.means, self.weights, 1 - EMA)
            self.total.add_(loss.detach())


def train_flow(parts: Parts, buckets: Sequence[Bucket], plan: Plan) -> dict[str, object]:
    """Train for the plan's steps, or its seconds if those are less; the weights end as their running mean."""
    device = buckets[0].latents.device
    generator, rng = torch.Generator(device).manual_seed(plan.seed), random.Random(plan.seed)
    empty = token_ids(parts, [""]).to(device)
    trainer = Trainer(parts, device, empty, plan.guided)
    places = [Batch.of(bucket, plan.batch) for bucket in buckets]
    runs = []
    for bucket, place in zip(buckets, places, strict=True):
        place.fill(bucket, empty, generator)
        runs.append(record(partial(trainer.step, place, bucket.size), device))
    started, count, losses = time.perf_counter(), 0, []
    trainer.total.zero_()
    for done in progress(plan.steps, plan.limit):
        trainer.rate.fill_(rate(trainer.peak, count, WARM_UP, done))
        (number,) = rng.choices(range(len(buckets)), list(BUCKETS.values()))
        places[number].fill(buckets[number], empty, generator)
        runs[number]()
        count += 1
        if count % 1000 == 0:
            losses.append(trainer.total.item() / 1000)
            trainer.total.zero_()
            print(f"{plan.name} {count} {time.perf_counter() - started:.0f} s, loss {losses[-1]:.4f}", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(trainer.weights, trainer.means)
    for weight in trainer.weights:
        weight.grad = None
    seconds = time.perf_counter() - started
    return {f"{plan.name}_steps": count, f"{plan.name}_seconds": seconds, f"{plan.name}_losses": losses}


@torch.no_grad()
def draw(
    parts: Parts, captions: Sequence[str], size: tuple[int, int], steps: int = 28, guidance: float = 4.0, seed: int = 0
) -> Tensor:
    """Captions -> pictures [N, 3, H, W] in [-1, 1] by Euler steps on diffusers' schedule."""
    device = parts.transformer.device
    rows = size[0] // 16 * (size[1] // 16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    grid = [1 - n / steps for n in range(steps)]
    scheduler.set_timesteps(sigmas=grid, mu=compute_empirical_mu(rows, steps))
    text = context(parts, token_ids(parts, captions).to(device))
    latents = torch.randn(len(captions), rows, 128, generator=torch.Generator().manual_seed(seed)).to(device)
    told = torch.full((len(captions),), guidance, device=device)
    for sigma, following in zip(scheduler.sigmas[:-1].tolist(), scheduler.sigmas[1:].tolist(), strict=True):
        predicted = velocity(parts, latents, text, torch.full_like(told, sigma), told, size)
        latents = latents + (following - sigma) * predicted
    return from_latents(parts.vae, latents, *size)
