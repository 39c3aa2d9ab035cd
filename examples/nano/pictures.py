"""Scenes to pixels: figures as signed distances, in the base's flat style and in others.

Works on whole batches and on any device. Letters: N scenes, F = 3 figures at most, H W rows and columns.
Distances are in pixels, negative inside; y points down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scenes import COLOURS, NAMES, PLACES, RELATIONS, SHAPES, SIZES, STYLES, Scene, Strokes

Tensor = torch.Tensor
FIGURES, TRIES = 3, 64
INK = (28, 28, 38)
PALETTE = torch.tensor([COLOURS[name] for name in NAMES]) / 127.5 - 1
"""Colours [8, 3] in [-1, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Scenes as tensors: N first, then a place for each of three figures."""

    background: Tensor  # [N] index into NAMES
    shape: Tensor  # [N, F]
    colour: Tensor  # [N, F]
    radius: Tensor  # [N, F] share of the shorter side, 0 where there is no figure
    bounds: Tensor  # [N, 4] least and greatest x, least and greatest y of the centres
    direction: Tensor  # [N, 2] from the first figure to the second

    def __getitem__(self, index: Tensor | slice) -> "Packed":
        """Some of the scenes."""
        return Packed(**{name: getattr(self, name)[index] for name in self.__slots__})

    def to(self, device: str) -> "Packed":
        """The same on another device."""
        return Packed(**{name: getattr(self, name).to(device) for name in self.__slots__})


def pack(scenes: Sequence[Scene]) -> Packed:
    """Scenes as tensors."""
    absent = [0] * FIGURES
    return Packed(
        background=torch.tensor([NAMES.index(s.background) for s in scenes]),
        shape=torch.tensor([([SHAPES.index(f.shape) for f in s.figures] + absent)[:FIGURES] for s in scenes]),
        colour=torch.tensor([([NAMES.index(f.colour) for f in s.figures] + absent)[:FIGURES] for s in scenes]),
        radius=torch.tensor([([SIZES[f.size] for f in s.figures] + [0.0] * FIGURES)[:FIGURES] for s in scenes]),
        bounds=torch.tensor([PLACES[s.place] for s in scenes]),
        direction=torch.tensor([RELATIONS[s.relation or "and"] for s in scenes]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the figures are: centres [N, F, 2] (x, y) and radii [N, F] in pixels."""

    centres: Tensor
    radii: Tensor


def lay_out(packed: Packed, height: int, width: int, generator: torch.Generator) -> Layout:
    """Random places that obey the scenes: of `TRIES` the one with the most room, so that figures rarely touch."""
    device, count = packed.radius.device, len(packed.radius)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    radii = packed.radius * min(height, width) * (0.92 + 0.16 * uniform(count, 1))
    sides = torch.tensor([width, height], device=device)
    margin = radii[:, None, :, None] * 1.08 + 3
    low = torch.maximum(packed.bounds[:, None, None, 0::2] * sides, margin)
    high = torch.minimum(packed.bounds[:, None, None, 1::2] * sides, sides - margin)
    high = torch.maximum(high, low)
    centres = low + (high - low) * uniform(count, TRIES, FIGURES, 2)
    room = _room(centres, radii[:, None], packed.direction[:, None])
    best = torch.where(room > 0, 1e6 * uniform(count, TRIES), room).argmax(1)  # any that fits, else the roomiest
    return Layout(centres=centres[torch.arange(count, device=device), best], radii=radii)


def _room(centres: Tensor, radii: Tensor, direction: Tensor) -> Tensor:
    """Pixels [N, TRIES] by which the worst of all conditions is met: no overlap, and the second figure's direction."""
    present = radii > 0
    room = torch.full(centres.shape[:2], 1e3, device=centres.device)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        gap = (centres[..., a, :] - centres[..., b, :]).norm(dim=-1) - 1.12 * (radii[..., a] + radii[..., b]) - 4
        room = torch.where(present[..., a] & present[..., b], torch.minimum(room, gap), room)
    step = centres[..., 1, :] - centres[..., 0, :]
    along = (step * direction).sum(-1)
    aside = (step * (1 - direction.abs())).sum(-1).abs()
    return torch.where(direction.abs().sum(-1) > 0, torch.minimum(room, along - 1.5 * aside), room)


def distances(packed: Packed, layout: Layout, height: int, width: int) -> Tensor:
    """Signed distance [N, F, H, W] to every figure; far away where there is none."""
    device = layout.centres.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    dx = x + 0.5 - layout.centres[..., 0, None, None]
    dy = y + 0.5 - layout.centres[..., 1, None, None]
    r = layout.radii[..., None, None]
    every = torch.stack([shape(dx, dy, r) for shape in _DISTANCE], 2)
    index = packed.shape[:, :, None, None, None].expand(*packed.shape.shape, 1, height, width)
    return torch.where(r > 0, every.gather(2, index).squeeze(2), torch.tensor(1e3, device=device))


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.86 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    sides = torch.maximum(y, 0.866 * x.abs() - 0.5 * y)
    return sides - 0.58 * r


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """All edges are one after folding the plane into a tenth: from the tip to the inner corner beside it."""
    fifth = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2).abs()
    radius = torch.hypot(x, y)
    tip, inner = 1.12, 0.5
    edge = (inner * math.cos(fifth / 2) - tip, inner * math.sin(fifth / 2))
    length = math.hypot(*edge)
    normal = (edge[1] / length, -edge[0] / length)
    return normal[0] * (radius * torch.cos(angle) - tip * r) + normal[1] * radius * torch.sin(angle)


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    long, short = 0.95 * r, 0.32 * r
    return torch.minimum(torch.maximum(ax - long, ay - short), torch.maximum(ay - long, ax - short))


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.74 * r).abs() - 0.25 * r


_DISTANCE = (_circle, _square, _triangle, _star, _cross, _ring)  # in the order of SHAPES


def flat(packed: Packed, distance: Tensor, tint: Tensor | None = None) -> Tensor:
    """The base's style, [N, 3, H, W] in [-1, 1]: plain colours, smooth edges; `tint` [N, F + 1, 3] shifts colours."""
    palette = PALETTE.to(distance.device)
    tint = torch.zeros(len(distance), FIGURES + 1, 3, device=distance.device) if tint is None else tint
    picture = (palette[packed.background] + tint[:, FIGURES])[:, :, None, None]
    for figure in range(FIGURES):
        cover = (0.5 - distance[:, figure, None]).clamp(0, 1)
        colour = (palette[packed.colour[:, figure]] + tint[:, figure])[:, :, None, None]
        picture = picture * (1 - cover) + colour * cover
    return picture.clamp(-1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pen:
    """A drawn style: outlines and hatching in one ink; lengths in pixels (0: none), every value [N]."""

    outline: Tensor
    hatch: Tensor
    period: Tensor
    angle: Tensor
    ink: Tensor  # [N, 3] in [-1, 1]

    def __getitem__(self, index: Tensor | slice) -> "Pen":
        """Some of the pens."""
        return Pen(**{name: getattr(self, name)[index] for name in self.__slots__})

    def to(self, device: str) -> "Pen":
        """The same on another device."""
        return Pen(**{name: getattr(self, name).to(device) for name in self.__slots__})


def lesson_pen(count: int) -> Pen:
    """The style of the lesson: dark outlines, hatching that rises to the right, one line for each token of 16 pixels.

    Lines as fine as two for a token do not come back from the VAE.
    """
    one = torch.ones(count)
    return Pen(
        outline=3.0 * one,
        hatch=3.0 * one,
        period=16 / math.sqrt(2) * one,
        angle=math.pi / 4 * one,
        ink=(torch.tensor(INK) / 127.5 - 1).expand(count, 3),
    )


def pens(styles: Sequence[str]) -> Pen:
    """The pens of the base's styles, by their names; the empty one draws nothing."""
    flat_style = Strokes(colour=NAMES[0])
    strokes = [STYLES.get(style, flat_style) for style in styles]
    return Pen(
        outline=torch.tensor([float(s.outline) for s in strokes]),
        hatch=torch.tensor([float(s.hatch) for s in strokes]),
        period=torch.tensor([float(s.period) for s in strokes]),
        angle=torch.tensor([math.radians(s.angle) for s in strokes]),
        ink=PALETTE[[NAMES.index(s.colour) for s in strokes]],
    )


def drawn(picture: Tensor, distance: Tensor, pen: Pen) -> Tensor:
    """Pen strokes over a flat picture: every figure outlined inside its edge and hatched."""
    height, width = picture.shape[-2:]
    device = picture.device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    angle, period = pen.angle[:, None, None], pen.period[:, None, None]
    along = torch.remainder(x * torch.cos(angle) + y * torch.sin(angle), period)
    wide = 0.5 * pen.hatch[:, None, None]
    line = (wide - (along - period / 2).abs() + 0.5).clamp(0, 1) * (wide > 0)
    half = 0.5 * pen.outline[:, None, None]
    stroke = torch.zeros_like(line)
    for figure in range(FIGURES):
        inside = (0.5 - distance[:, figure]).clamp(0, 1)
        edge = (half - (distance[:, figure] + half).abs() + 0.5).clamp(0, 1) * (half > 0)
        stroke = torch.maximum(stroke, torch.maximum(line * inside, edge))
    stroke = stroke[:, None]
    return picture * (1 - stroke) + pen.ink[:, :, None, None] * stroke
