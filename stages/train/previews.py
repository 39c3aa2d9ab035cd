"""Previews: pictures drawn while training goes on, left as latents; the VAE is another process."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from flux2_relay.stages.files import write_tensors
from flux2_relay.stages.train.contexts import Contexts, to_mlx
from flux2_relay.stages.train.options import PreviewOptions, PromptOptions
from flux2_relay.stages.train.sample import Picture, draw
from flux2_relay.stages.train.transformer import Transformer


class Previews:
    """The pictures of one run; `draw(…, step)` writes those of one step."""

    def __init__(
        self, options: PreviewOptions, prompts: Sequence[Mapping], contexts: Contexts, distilled: bool, folder: Path
    ) -> None:
        """`prompts` are a set's, in the order of the options' own; `folder` is the run's."""
        self._options, self._prompts, self._contexts = options, prompts, contexts
        self._distilled, self._folder = distilled, folder / "previews"

    def draw(self, transformer: Transformer, step: int, again: bool) -> None:
        """Draw the pictures of `step`; those that are there already only `again`."""
        for index, (options, keys) in enumerate(self._wanted()):
            path = self._folder / f"{step:06d}-{index:02d}.safetensors"
            if again or not path.exists():
                latents = draw(transformer, self._picture(options, keys))
                write_tensors(path, {"latents": latents}, {"prompt": options.prompt, "step": str(step)})

    def _wanted(self) -> Iterator[tuple[PromptOptions, Mapping]]:
        return zip(self._options.pictures(), self._prompts, strict=True)

    def _picture(self, options: PromptOptions, keys: Mapping) -> Picture:
        width, height = options.size or self._options.size
        return Picture(
            context=self._contexts.context(keys["text"]),
            negative=None if self._distilled else self._contexts.context(keys["negative"]),
            height=height // 16,
            width=width // 16,
            seed=options.seed or 0,
            steps=options.steps or self._options.steps,
            guidance=self._options.guidance if options.guidance is None else options.guidance,
            references=tuple(self._reference(key) for key in keys["references"]),
        )

    def _reference(self, key: str) -> mx.array:
        return to_mlx(self._contexts.store.read("latents", key))
