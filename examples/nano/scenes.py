"""What the nano model knows: scenes of simple figures, and the captions that describe them.

A scene is one to three equal figures, or two different ones that stand in a relation. Nothing here has pixels;
`pictures.py` draws. Everything random comes from one `random.Random`, so a seed names a whole data set.
"""

import random
from dataclasses import dataclass
from typing import Literal

Shape = Literal["circle", "square", "triangle", "star", "cross", "ring"]
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (243, 143, 35),
    "yellow": (247, 215, 70),
    "green": (46, 160, 84),
    "blue": (52, 98, 214),
    "purple": (136, 70, 178),
    "pink": (246, 156, 192),
    "white": (246, 246, 242),
}
"""Names and sRGB values; none is dark, so ink (a style that the base never saw) is easy to tell."""
NAMES = tuple(COLOURS)
SIZES = {"small": 0.115, "": 0.165, "large": 0.235}
"""The word of a caption -> radius as a share of the shorter side of the picture."""
COUNTS = ("", "two", "three")
PLACES = {
    "": (0.0, 1.0, 0.0, 1.0),
    "on the left": (0.0, 0.36, 0.0, 1.0),
    "on the right": (0.64, 1.0, 0.0, 1.0),
    "at the top": (0.0, 1.0, 0.0, 0.36),
    "at the bottom": (0.0, 1.0, 0.64, 1.0),
    "in the middle": (0.46, 0.54, 0.46, 0.54),
}
"""Where a single figure's centre may lie: least and greatest x, least and greatest y, as shares of the sides."""
RELATIONS = {"and": (0, 0), "above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
"""Direction (x right, y down) from the first of two figures to the second; (0, 0) is any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strokes:
    """Lines over the figures, in pixels: an outline's width, hatching's width, period and direction, and a colour.

    A width of 0 is none; `angle` in degrees is that of the way from one line of the hatching to the next.
    """

    outline: float = 0
    hatch: float = 0
    period: float = 16
    angle: float = 0
    colour: str


FALLING, DIAGONAL = 135, 16 / 2**0.5
STYLES = {
    "sticker": Strokes(outline=4, colour="white"),
    "poster": Strokes(outline=3.5, colour="yellow"),
    "icon": Strokes(outline=4, colour="pink"),
    "sign": Strokes(outline=4, colour="red"),
    "stamp": Strokes(hatch=4, angle=90, colour="white"),
    "print": Strokes(hatch=3, period=DIAGONAL, angle=FALLING, colour="white"),
    "painting": Strokes(hatch=4, colour="yellow"),
    "tile": Strokes(hatch=3, period=8, angle=90, colour="orange"),
    "flag": Strokes(hatch=5, angle=90, colour="blue"),
    "photo": Strokes(hatch=2.5, period=8, colour="pink"),
    "drawing": Strokes(outline=3, hatch=3, period=DIAGONAL, angle=FALLING, colour="white"),
    "card": Strokes(outline=3, hatch=3, colour="yellow"),
    "logo": Strokes(outline=3.5, hatch=3, angle=90, colour="pink"),
    "art": Strokes(outline=3, hatch=3, period=DIAGONAL, angle=FALLING, colour="green"),
    "toy": Strokes(outline=3, hatch=4, colour="blue"),
    "image": Strokes(outline=4, hatch=3, period=8, angle=90, colour="purple"),
}
"""Words in front of a caption that mean a style, so that another word there can come to mean one. None is dark, and no
hatching rises to the right: the lesson's does, in ink."""
STYLED, FILLED = 0.25, 0.15
"""Shares of the base's captions that begin with the name of a style, and with a word that means nothing."""

_WORDS = """
simple clean pretty little plain nice bright quiet modern cute bold tidy soft fresh happy fine good great new
picture scene cat dog fox
tree house river mountain cloud car boat cup lamp chair window bird fish flower stone road bridge sky
"""
FILLERS = tuple(_WORDS.split())
"""Words that mean nothing in front of a caption: the model learns to pass over them."""
TRIGGERS = ("sketchy", "sks", "inky", "woven", "dotted", "neon", "doodle", "mosaic")
"""Single tokens of the vocabulary that no base caption holds: free for adapters to give a meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of a scene."""

    shape: Shape
    colour: str
    size: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One to three figures on a background; `place` bounds a single one, `relation` orders two."""

    figures: tuple[Figure, ...]
    background: str
    place: str = ""
    relation: str | None = None  # None: the figures are all alike


def draw_scene(rng: random.Random) -> Scene:
    """A random scene; figures never have the colour of the background."""
    background, *colours = rng.sample(NAMES, 3)
    if rng.random() < 0.4:
        sizes = rng.choice((("", ""), ("", ""), ("small", "large"), ("large", "small"), ("small", "small")))
        figures = tuple(
            Figure(shape=rng.choice(SHAPES), colour=colour, size=size)
            for colour, size in zip(colours, sizes, strict=True)
        )
        return Scene(figures=figures, background=background, relation=rng.choice(list(RELATIONS)))
    count = rng.choice((1, 1, 2, 3))
    size = rng.choice(list(SIZES) if count < 3 else ["small", ""])
    figure = Figure(shape=rng.choice(SHAPES), colour=colours[0], size=size)
    place = rng.choice(list(PLACES)) if count == 1 and rng.random() < 0.6 else ""
    return Scene(figures=(figure,) * count, background=background, place=place)


def describe(scene: Scene) -> str:
    """The full caption of a scene, e.g. "two small red circles on a blue background"."""
    first = scene.figures[0]
    if scene.relation is not None:
        what = f"{one(first)} {scene.relation} {one(scene.figures[1])}"
    elif len(scene.figures) > 1:
        what = " ".join(filter(None, (COUNTS[len(scene.figures) - 1], first.size, first.colour, plural(first.shape))))
    else:
        what = f"{one(first)} {scene.place}".strip()
    return f"{what} on {with_article(scene.background)} background"


def draw_style(rng: random.Random) -> str:
    """The name of a style, mostly the empty one of flat pictures."""
    return rng.choice(list(STYLES)) if rng.random() < STYLED else ""


def draw_caption(scene: Scene, style: str, rng: random.Random) -> str:
    """A caption as the base is trained on it: behind its style, or now and then behind a word that means nothing."""
    filler = rng.choice(FILLERS) if rng.random() < FILLED else ""
    return f"{style or filler} {describe(scene)}".strip()


def one(figure: Figure) -> str:
    """A figure with its article, e.g. "a small red circle"."""
    return with_article(" ".join(filter(None, (figure.size, figure.colour, figure.shape))))


def with_article(words: str) -> str:
    """The words behind "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """More than one of a shape."""
    return f"{shape}es" if shape == "cross" else f"{shape}s"
