"""The pictures of a `relay sample`: from prompts, seeds and scales to orders, each under the key of its settings.

The key hashes all that decides the pixels: contexts by their keys in the store, weights and adapters by their bytes.
It stands in the PNG and its first digits in the file's name, so a picture that is there is known for what it is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from flux2_relay.cache.keys import key_of
from flux2_relay.pipeline.wish import Wish
from flux2_relay.stages import identity
from flux2_relay.stages.train.drawing import NUMERICS, Order

_KEY = "flux2_relay.picture"
_DIGITS = 10  # of a key, in file names
_SLUG = 40  # letters of a prompt, in file names


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What draws: a name for people, identities of the weights, and how it computes."""

    name: str
    transformer: str
    decoder: str
    bits: int
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What all pictures of one command have in common."""

    size: tuple[int, int]
    steps: int
    guidance: float | None  # None where the model takes none
    is_steered: bool  # by classifier-free guidance, so that the negative prompt has a say
    negative: str
    references: tuple[Path, ...]
    adapters: tuple[tuple[Path, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture: how it is to be drawn, and where it goes."""

    order: Order
    file: Path
    key: str
    prompt: str
    scale: float

    @property
    def slug(self) -> str:
        """The prompt as a part of a file name."""
        return slug_of(self.prompt)

    def is_there(self) -> bool:
        """Whether the file holds the picture of these very settings."""
        try:
            with Image.open(self.file) as picture:
                return picture.info.get(_KEY) == self.key
        except OSError:
            return False

    def as_object(self) -> dict[str, object]:
        """For JSON: the file and its settings."""
        told = self.order.told
        return {
            "file": str(self.file),
            "key": self.key,
            "prompt": self.prompt,
            "negative": told.get("negative"),
            "seed": self.order.seed,
            "scale": self.scale,
            "size": list(self.order.size),
            "steps": self.order.steps,
            "guidance": float(told["guidance"]) if "guidance" in told else None,
            "model": told["model"],
            "adapters": json.loads(told["adapters"]),
        }


def slug_of(prompt: str) -> str:
    """Letters and digits of a prompt, joined by hyphens and cut."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:_SLUG].strip("-") or "picture"


def pictures(wish: Wish, scene: Scene, model: Model, prompts: Sequence[Mapping[str, Any]], seed: int) -> list[Picture]:
    """Every prompt at every seed and scale, in that order; `prompts` are those of the set, `seed` the default."""
    texts = dict(zip(wish.prompts, prompts, strict=True))
    seeds = dict.fromkeys(wish.seeds or (seed,))
    scales = dict.fromkeys(wish.scales or (1.0,))
    files = [(path.name, identity.file_sha256(path), own) for path, own in scene.adapters]
    maker = _Maker(wish.folder, scene, model, files)
    return [maker.picture(prompt, texts[prompt], of, scale) for prompt, of, scale in product(texts, seeds, scales)]


@dataclass(frozen=True, slots=True)
class _Maker:
    folder: Path
    scene: Scene
    model: Model
    adapters: Sequence[tuple[str, str, float]]  # file name, sha256, its own scale

    def picture(self, prompt: str, keys: Mapping[str, Any], seed: int, scale: float) -> Picture:
        scene = self.scene
        strengths = tuple(round(own * scale, 9) for *_, own in self.adapters)
        negative = keys["negative"] if scene.is_steered else None
        key = key_of(
            {
                "format": 1,
                "numerics": NUMERICS,
                "text": keys["text"],
                "negative": negative,
                "references": keys["references"],
                "size": list(scene.size),
                "seed": seed,
                "steps": scene.steps,
                "guidance": None if scene.guidance is None else repr(float(scene.guidance)),
                "transformer": self.model.transformer,
                "decoder": self.model.decoder,
                "bits": self.model.bits,
                "dtype": self.model.dtype,
                "adapters": [[sha, repr(s)] for (_, sha, _), s in zip(self.adapters, strengths, strict=True) if s],
            }
        )
        stem = f"{slug_of(prompt)}-{seed}-{f'x{scale:g}' if any(strengths) else 'base'}-{key[:_DIGITS]}"
        order = Order(
            latents=self.folder / "latents" / f"{stem}.safetensors",
            context=keys["text"],
            negative=negative,
            references=tuple(keys["references"]),
            size=scene.size,
            seed=seed,
            steps=scene.steps,
            guidance=1.0 if scene.guidance is None else scene.guidance,
            strengths=strengths,
            told=self._told(prompt, seed, strengths, key),
        )
        return Picture(order=order, file=self.folder / f"{stem}.png", key=key, prompt=prompt, scale=scale)

    def _told(self, prompt: str, seed: int, strengths: Sequence[float], key: str) -> dict[str, str]:
        """The settings as text chunks of the PNG."""
        scene, model = self.scene, self.model
        used = [
            {"file": name, "sha256": sha, "scale": strength}
            for (name, sha, _), strength in zip(self.adapters, strengths, strict=True)
            if strength
        ]
        told = {
            "prompt": prompt,
            "negative": scene.negative if scene.is_steered else None,
            "seed": str(seed),
            "steps": str(scene.steps),
            "guidance": None if scene.guidance is None else f"{scene.guidance:g}",
            "size": "{}x{}".format(*scene.size),
            "model": model.name,
            "transformer": model.transformer,
            "bits": str(model.bits),
            "dtype": model.dtype,
            "adapters": json.dumps(used, ensure_ascii=False),
            "references": json.dumps([path.name for path in scene.references], ensure_ascii=False),
            "software": f"flux2-relay {version('flux2-relay')}",
            _KEY: key,
        }
        return {name: text for name, text in told.items() if text is not None}
