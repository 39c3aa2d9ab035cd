"""Captions to pictures by the program's own pieces: text encoder, transformer with an adapter or none, VAE decoder.

Each model has its turn, as in the stages. Two processes share the pictures: a model this small keeps one core busy.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

from flux2_relay.stages import blas  # before MLX  # isort: skip
import mlx.core as mx
import numpy as np
from score import bounds

from flux2_relay.stages import spec, vae
from flux2_relay.stages.decode.stage import to_pixels
from flux2_relay.stages.encode.text import load_text_encoder
from flux2_relay.stages.one_model import in_turn
from flux2_relay.stages.train import init, lora, sample
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import load_transformer


@dataclass(frozen=True, kw_only=True)
class Studio:
    """How pictures are drawn."""

    model: Path
    adapter: Path | None = None
    options: LoraOptions = field(default_factory=LoraOptions)
    """Those that the adapter was trained with."""
    steps: int = bounds.STEPS

    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        """A picture uint8 [128, 128, 3] for each caption, from the noise of its seed."""
        specs = spec.from_checkpoint(self.model)
        contexts = in_turn("text encoder", lambda: self._contexts(specs.text, captions), _quiet)
        latents = in_turn("transformer", lambda: self._latents(specs.transformer, contexts, seeds), _quiet)
        return in_turn("VAE decoder", lambda: self._pictures(latents), _quiet)

    def draw_on_two_cores(self, captions: Sequence[str]) -> list[np.ndarray]:
        """The same, caption number n from the noise of seed n, by two processes."""
        pictures: list[np.ndarray] = [np.empty(0)] * len(captions)
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            halves = [range(first, len(captions), 2) for first in (0, 1)]
            drawn = [pool.submit(self.draw, [captions[n] for n in half], half) for half in halves]
            for half, done in zip(halves, drawn, strict=True):
                for n, picture in zip(half, done.result(), strict=True):
                    pictures[n] = picture
        return pictures

    def _contexts(self, text: spec.TextSpec, captions: Sequence[str]) -> mx.array:
        contexts = load_text_encoder(self.model, text, bits=32).encode(captions)
        mx.eval(contexts)
        return contexts

    def _latents(self, of: spec.TransformerSpec, contexts: mx.array, seeds: Sequence[int]) -> list[mx.array]:
        blas.suit(of.hidden)
        transformer = load_transformer(self.model, of, bits=32)
        if self.adapter is not None:
            lora.attach(transformer, self.options, seed=0)
            init.start(transformer, replace(self.options, init=str(self.adapter)))
        picture = sample.Picture(
            context=contexts[0],
            negative=None,  # the model takes guidance as an input
            height=bounds.SIDE // 16,
            width=bounds.SIDE // 16,
            seed=0,
            steps=self.steps,
            guidance=bounds.GUIDANCE,
        )
        wanted = (replace(picture, context=c, seed=seed) for c, seed in zip(contexts, seeds, strict=True))
        return [sample.draw(transformer, one) for one in wanted]

    def _pictures(self, latents: Sequence[mx.array]) -> list[np.ndarray]:
        decoder = vae.load_decoder(self.model)
        return [to_pixels(decoder.decode(one[None])[0]) for one in latents]


def _quiet(sentence: str) -> None:
    """Nobody asks what memory this took."""
