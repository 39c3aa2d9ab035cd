"""Does a picture show what its caption says, and in which style? Plain arithmetic on pixels, no network.

Letters: H W rows and columns. Pictures are uint8 [H, W, 3]; needs numpy alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scenes import COLOURS, NAMES, RELATIONS, SHAPES, Scene

_PALETTE = np.array([COLOURS[name] for name in NAMES], dtype=np.float32)
_DARK = 80.0  # luminance; the darkest colour has 93, ink 29
_LEAST = 24  # pixels of the smallest thing that counts as a figure
_INK = np.array([28, 28, 38], dtype=np.float32)  # of the lesson's pen
_PURE = 30.0  # distance from a colour under ink at which a pixel counts a third
_GRID = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A figure as it was found: what it looks like and where its centre is, as shares of the sides."""

    shape: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What of a caption holds in a picture."""

    background: bool
    colours: bool  # of the figures, by their number
    count: bool
    shapes: bool
    order: bool  # place of a single figure, relation of two

    @property
    def follows(self) -> bool:
        """Colours of figures and background, and the shapes: what `make score` asks for."""
        return self.background and self.colours and self.shapes


def judge(picture: np.ndarray, scene: Scene) -> Verdict:
    """Compare a picture with the scene that its caption describes."""
    background, seen = look(picture)
    wanted = scene.figures
    return Verdict(
        background=background == scene.background,
        colours={f.colour for f in seen} == {f.colour for f in wanted},
        count=len(seen) == len(wanted),
        shapes={(f.colour, f.shape) for f in seen} == {(f.colour, f.shape) for f in wanted},
        order=_ordered(seen, scene),
    )


def ink(picture: np.ndarray) -> float:
    """The style statistic: the share of the figures' pixels that are dark (the base's colours never are)."""
    dark = _luminance(picture) < _DARK
    figures = _figures(picture, _background(picture)) | dark
    return float(dark.sum() / max(1, figures.sum()))


def look(picture: np.ndarray) -> tuple[str, list[Seen]]:
    """The background's name and the figures of a picture, the largest first."""
    background = _background(picture)
    parts = [part for part in _components(_figures(picture, background)) if part.sum() >= _LEAST]
    height, width = picture.shape[:2]
    seen = []
    for part in sorted(parts, key=np.sum, reverse=True):
        rows, columns = np.nonzero(part)
        x, y = (columns.min() + columns.max() + 1) / 2 / width, (rows.min() + rows.max() + 1) / 2 / height
        colour = _colour(picture, part, background)
        if colour == "none":  # a stroke or a blot of ink beside the figures
            continue
        seen.append(Seen(shape=_shape(part), colour=colour, x=float(x), y=float(y)))
    return NAMES[background], seen


def _ordered(seen: Sequence[Seen], scene: Scene) -> bool:
    if scene.relation is not None:
        places = [[f for f in seen if f.colour == wanted.colour] for wanted in scene.figures]
        if not all(places):
            return False
        dx, dy = places[1][0].x - places[0][0].x, places[1][0].y - places[0][0].y
        right, down = RELATIONS[scene.relation]
        return (right, down) == (0, 0) or dx * right + dy * down > abs(dx * down) + abs(dy * right)
    if not scene.place:
        return True
    if not seen:
        return False
    x, y = seen[0].x, seen[0].y
    middle = abs(x - 0.5) < 0.12 and abs(y - 0.5) < 0.12
    met = {"left": x < 0.42, "right": x > 0.58, "top": y < 0.42, "bottom": y > 0.58, "middle": middle}
    return met[scene.place.split()[-1]]


def _luminance(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _nearest(pixels: np.ndarray) -> np.ndarray:
    """Pixels [n, 3] -> index of the nearest colour [n]."""
    return ((pixels[:, None].astype(np.float32) - _PALETTE) ** 2).sum(-1).argmin(-1)


def _background(picture: np.ndarray) -> int:
    """The commonest colour along the border."""
    border = np.concatenate([picture[[0, 1, -2, -1]].reshape(-1, 3), picture[:, [0, 1, -2, -1]].reshape(-1, 3)])
    return int(np.bincount(_nearest(border)).argmax())


def _figures(picture: np.ndarray, background: int) -> np.ndarray:
    """Pixels [H, W] that are further from the background than half the way to the nearest other colour."""
    colour = _PALETTE[background]
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(np.float32)
    near = border[((border - colour) ** 2).sum(-1) < 60**2]
    colour = np.median(near, 0) if len(near) else colour
    others = np.sqrt(((np.delete(_PALETTE, background, 0) - colour) ** 2).sum(-1))
    return np.sqrt(((picture - colour) ** 2).sum(-1)) > 0.5 * others.min()


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, pixels joined by their four sides."""
    left = mask.copy()
    parts = []
    while left.any():
        part = np.zeros_like(mask)
        stack = [tuple(np.argwhere(left)[0])]
        left[stack[0]] = False
        while stack:
            row, column = stack.pop()
            part[row, column] = True
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= r < mask.shape[0] and 0 <= c < mask.shape[1] and left[r, c]:
                    left[r, c] = False
                    stack.append((r, c))
        parts.append(part)
    return parts


def _colour(picture: np.ndarray, part: np.ndarray, background: int) -> str:
    """The colour that most of a figure's pixels have, other than the background's, ink or no ink over it.

    A pixel is taken for the colour from which the line to ink passes nearest; the purer it is, the more it counts.
    Without the line, yellow half under ink would be nearest to green.
    """
    pixels, axes = picture[part].astype(np.float32) - _INK, _PALETTE - _INK
    share = np.clip(pixels @ axes.T / (axes**2).sum(-1), 0, 1)
    apart = np.sqrt(((pixels[:, None] - share[..., None] * axes) ** 2).sum(-1))
    nearest, rows = apart.argmin(1), np.arange(len(pixels))
    weight = share[rows, nearest] ** 2 * np.exp(-((apart[rows, nearest] / _PURE) ** 2))
    votes = np.bincount(nearest, weight, len(NAMES))
    votes[background] = 0
    return NAMES[votes.argmax()] if votes.any() else "none"


def _shape(part: np.ndarray) -> str:
    """The shape whose mask overlaps best (intersection over union) with the part, both filling their boxes."""
    rows, columns = np.nonzero(part)
    box = part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    at = (np.arange(_GRID) + 0.5) / _GRID
    scaled = box[np.ix_((at * box.shape[0]).astype(int), (at * box.shape[1]).astype(int))]
    if not 0.6 < box.shape[0] / box.shape[1] < 1.67:
        return "none"
    overlap = {name: (scaled & mask).sum() / (scaled | mask).sum() for name, mask in _MASKS.items()}
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] > 0.6 else "none"


def _masks() -> dict[str, np.ndarray]:
    """What each shape looks like when it fills its box [32, 32]."""
    x, y = np.meshgrid(*((np.arange(_GRID) + 0.5) / _GRID * 2 - 1,) * 2)
    radius = np.hypot(x, y)
    fifth = 2 * np.pi / 5
    top = 2 / (1 + np.cos(fifth / 2))  # a star's box is not centred on it: tip at 1, feet at cos(36 degrees)
    sx, sy = x * np.sin(fifth) * 1.0, (y + 1) / top - 1
    angle = np.abs(np.mod(np.arctan2(sx, -sy) + fifth / 2, fifth) - fifth / 2)
    inner = 0.5 / 1.12
    edge = np.array([inner * np.cos(fifth / 2) - 1, inner * np.sin(fifth / 2)])
    star = edge[1] * (np.hypot(sx, sy) * np.cos(angle) - 1) - edge[0] * np.hypot(sx, sy) * np.sin(angle) < 0
    return {
        "circle": radius < 1,
        "square": radius < 9,
        "triangle": np.abs(x) < (y + 1) / 2,
        "star": star,
        "cross": np.minimum(np.abs(x), np.abs(y)) < 0.32 / 0.95,
        "ring": (radius < 1) & (radius > 0.49 / 0.99),
    }


_MASKS = _masks()
assert set(_MASKS) == set(SHAPES)
