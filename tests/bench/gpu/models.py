"""The models of the bench: full size, or so small that a CPU runs every path in a second."""

from dataclasses import dataclass, replace

import mlx.core as mx

from flux2_relay.stages.catalogue import CATALOGUE, ENCODERS
from flux2_relay.stages.sizes import TextSpec, TransformerSpec
from flux2_relay.stages.train import objective
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.transformer import image_ids, text_ids

TEXT_ROWS, TINY_TEXT_ROWS = 512, 16
VOCABULARY = 8192
"""Rows of the encoder's embedding: only those of the captions' tokens are ever read, so a small table will do."""


def transformer_spec(name: str, is_tiny: bool) -> TransformerSpec:
    """The catalogue's sizes, or the same architecture of width 64."""
    full, _ = CATALOGUE[name]
    if not is_tiny:
        return full
    return TransformerSpec(
        double_blocks=1,
        single_blocks=2,
        heads=2,
        head_dim=32,
        context_width=192,
        guidance=full.guidance,
        rope_axes=(8, 8, 8, 8),
    )


def text_spec(is_tiny: bool) -> TextSpec:
    """The encoder of dev with a small vocabulary, or a tiny one of the same family."""
    full = ENCODERS["Mistral Small 3.2 24B"]
    if not is_tiny:
        return replace(full, vocabulary=VOCABULARY)
    small = replace(full, layers=4, hidden=64, mlp_width=128, heads=4, kv_heads=2, head_dim=32, taps=(1, 2, 3))
    return replace(small, vocabulary=VOCABULARY)


@dataclass(frozen=True, slots=True)
class Task:
    """One random item; what a step is given besides the model."""

    batch: Batch
    guidance: mx.array | None
    options: TrainOptions

    @property
    def rows(self) -> int:
        """Text and image rows."""
        return self.batch.context.shape[1] + self.batch.latents.shape[1]

    def draw(self, step: int) -> tuple[mx.array, mx.array]:
        """Sigma [1] and noise [1, L, 128] of a step, as training draws them."""
        sigma, noise = objective.draw(0, step, 0, self.batch.latents.shape[1:], self.options)
        return mx.array([sigma], mx.float32), noise[None]


def task(spec: TransformerSpec, pixels: tuple[int, int], is_tiny: bool) -> Task:
    """A random picture of `pixels` (height, width) with a random caption, in bfloat16, batch 1."""
    height, width = (side // 16 for side in pixels)
    rows = TINY_TEXT_ROWS if is_tiny else TEXT_ROWS
    latents, context = mx.random.split(mx.random.key(1))
    batch = Batch(
        latents=mx.random.normal((1, height * width, spec.channels), key=latents).astype(mx.bfloat16),
        context=mx.random.normal((1, rows, spec.context_width), key=context).astype(mx.bfloat16),
        latent_ids=image_ids(height, width),
        text_ids=text_ids(rows),
    )
    return Task(batch, mx.ones(1) if spec.guidance else None, TrainOptions())
