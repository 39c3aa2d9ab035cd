"""Random inputs for the transformer and its adapters, from numpy alone, so that both sides get the same bits."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the transformer. Letters: B batch, L image tokens (references last), T text tokens."""

    latents: np.ndarray
    """[B, L, 128] float32."""
    context: np.ndarray
    """[B, T, C] float32."""
    sigma: np.ndarray
    """[B] float32 in [0, 1]."""
    guidance: np.ndarray | None = None
    """[B] float32, or None."""
    references: np.ndarray | None = None
    """[B, R, 128] float32: what the training objective puts behind the latents."""
    reference_ids: np.ndarray | None = None
    """[R, 4] int32."""
    mask: np.ndarray | None = None
    """[B, L] float32: how much each row's error counts."""
    item_weight: np.ndarray | None = None
    """[B] float32: how much each item's loss counts."""
    noise: np.ndarray
    """[B, L, 128] float32, for the training objective."""
    latent_ids: np.ndarray
    """[L, 4] int32: (t, row, column, 0)."""
    text_ids: np.ndarray
    """[T, 4] int32: (0, 0, 0, l)."""


def draw(
    context_width: int,
    *,
    seed: int,
    text: int = 40,
    grids: Sequence[Grid] = ((4, 6),),
    sigma: Sequence[float] = (0.83, 0.07),
    guidance: Sequence[float] | None = None,
) -> Case:
    """A case with a sample for each sigma; the first grid is the target's, the others are references."""
    random = np.random.default_rng(seed)
    batch, rows = len(sigma), sum(height * width for height, width in grids)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    return Case(
        latents=normal(batch, rows, 128),
        context=2 * normal(batch, text, context_width),
        sigma=np.asarray(sigma, np.float32),
        guidance=None if guidance is None else np.asarray(guidance, np.float32),
        noise=normal(batch, rows, 128),
        latent_ids=np.concatenate([_image_ids(grid, 10 * t) for t, grid in enumerate(grids)]),
        text_ids=np.stack([np.zeros(text)] * 3 + [np.arange(text)], axis=-1).astype(np.int32),
    )


def for_edits(case: Case, seed: int, grids: Sequence[Grid] = ((3, 2), (1, 4))) -> Case:
    """The same case with reference images, a mask with holes and a weight for each item."""
    random = np.random.default_rng(seed)
    batch, rows = case.latents.shape[:2]
    references = sum(height * width for height, width in grids)
    mask = random.uniform(0, 1, (batch, rows)) * (random.uniform(0, 1, (batch, rows)) > 0.3)
    mask[:, 0] = 1
    return replace(
        case,
        references=random.standard_normal((batch, references, 128), dtype=np.float32),
        reference_ids=np.concatenate([_image_ids(grid, 10 * t) for t, grid in enumerate(grids, start=1)]),
        mask=mask.astype(np.float32),
        item_weight=random.uniform(0.2, 2, batch).astype(np.float32),
    )


def _image_ids(grid: Grid, time: int) -> np.ndarray:
    height, width = grid
    ids = [(time, row, column, 0) for row in range(height) for column in range(width)]
    return np.array(ids, dtype=np.int32)


def flat(case: Case, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of a case under names that begin with `prefix`, for a file."""
    arrays = {field.name: getattr(case, field.name) for field in fields(case)}
    return {f"{prefix}{name}": value for name, value in arrays.items() if value is not None}


def from_flat(arrays: Mapping[str, np.ndarray]) -> Case:
    """The case whose arrays have these names; others are ignored."""
    return Case(**{field.name: arrays[field.name] for field in fields(Case) if field.name in arrays})


def steps(case: Case, sigmas: np.ndarray, noises: np.ndarray) -> list[Case]:
    """The same items at other noise levels, one case a step: sigmas [S, B], noises [S, B, L, 128]."""
    return [replace(case, sigma=sigma, noise=noise) for sigma, noise in zip(sigmas, noises, strict=True)]


def adapter(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """Factors for the names and shapes of an adapter; no B is zero, and each depends on (seed, name) alone."""
    return {name: _factor(name, shape, seed) for name, shape in shapes.items()}


def _factor(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    scale = 0.1 if ".lora_B." in name else 1 / np.sqrt(shape[-1])
    return np.float32(scale) * random.standard_normal(tuple(shape), dtype=np.float32)


def picture(height: int, width: int, seed: int, batch: int = 1) -> np.ndarray:
    """Images [B, H, W, 3] float32 in [-1, 1]: smooth waves and some noise, nothing symmetric."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 16
    phase = random.uniform(0, 6, (batch, 1, 1, 3))
    waves = np.sin(y[..., None] * [0.7, 1.1, 1.9] + x[..., None] * [1.3, -0.6, 0.4] + phase)
    return np.clip(0.7 * waves + 0.2 * random.standard_normal((batch, height, width, 3)), -1, 1).astype(np.float32)
