"""Pictures to figures, and figures to a table and a file.

The file holds one row for each set of pictures, under a digest of the model and of the lesson: what another model drew,
or the same one after another lesson, is forgotten.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from score import bounds
from score.prompts import CONFIG, DATA, MODEL, PRIOR, ROOT, scenes

from judge import ink, judge  # isort: skip  # beside scenes.py

FILE = ROOT / "runs/score.json"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of pictures for which a part of the caption holds, and their ink."""

    follows: float
    """Colours of background and figures, and shapes: what counts."""
    background: float
    colours: float
    shapes: float
    count: float
    order: float
    ink: float
    """Mean of the style statistic."""
    style: float | None = None
    """Share of the way from the base's ink to the lesson's; past the lesson's it falls again."""

    @property
    def is_good(self) -> bool:
        """Whether an adapter has learned its lesson and kept what the base knew."""
        return self.style is not None and self.style >= bounds.STYLE and self.follows >= bounds.CONTENT


def score(pictures: Sequence[np.ndarray], base_ink: float | None = None) -> Score:
    """Judge the pictures of the first scenes; with the base's ink, how far the style has come as well."""
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes(len(pictures)), strict=True)]
    names = ("follows", "background", "colours", "shapes", "count", "order")
    shares = {name: float(np.mean([getattr(verdict, name) for verdict in verdicts])) for name in names}
    found = float(np.mean(list(map(ink, pictures))))
    return Score(**shares, ink=found, style=None if base_ink is None else way(base_ink, found, lesson_ink()))


def way(base: float, found: float, lesson: float) -> float:
    """How much of the distance from `base` to `lesson` is gone at `found`: 1 is all, also when it was overshot."""
    return 1 - abs(lesson - found) / abs(lesson - base)


def lesson_pictures() -> list[np.ndarray]:
    """The data set."""
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(DATA.glob("*.png"))]


def lesson_ink() -> float:
    """Mean of the style statistic of the data set."""
    return float(np.mean(list(map(ink, lesson_pictures()))))


def area(lower: Sequence[float], upper: Sequence[float]) -> float:
    """Area under the curve: how often a value of `upper` is above one of `lower`, ties half."""
    pairs = [(a < b) + 0.5 * (a == b) for a in lower for b in upper]
    return float(np.mean(pairs))


@dataclass(kw_only=True)
class Board:
    """All that was measured so far."""

    made_by: str = field(default_factory=lambda: _digest(MODEL, DATA, PRIOR, CONFIG))
    machine: str = field(default_factory=lambda: f"{os.cpu_count()} cores, {platform.machine()}")
    rows: dict[str, Score] = field(default_factory=dict)
    facts: dict[str, float | str] = field(default_factory=dict)

    def write(self) -> None:
        """Write the file, with the rows of before if they are of the same model and lesson."""
        before = _read()
        if before.get("made_by") != self.made_by:
            before = {}
        found = asdict(self)
        joined = {name: {**before.get(name, {}), **found[name]} for name in ("rows", "facts")}
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps({**found, **joined}, indent=1) + "\n", "utf-8")

    def lines(self) -> list[str]:
        """The table."""
        return table({name: asdict(row) for name, row in self.rows.items()}, self.facts)


def table(rows: Mapping[str, Mapping[str, float | None]], facts: Mapping[str, float | str]) -> list[str]:
    """Rows and facts in Markdown, which is readable as it is."""
    names = list(Score.__dataclass_fields__)
    lines = [f"| pictures | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"] if rows else []
    for what, row in rows.items():
        lines.append(f"| {what} | {' | '.join(_cell(name, row[name]) for name in names)} |")
    said = [f"- {what}: {_fact(value)}" for what, value in facts.items()]
    return [*lines, "", *said] if said else lines


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if name == "ink" else f"{value:.0%}"


def _fact(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _digest(*places: Path) -> str:
    """Of files, and of all files of folders."""
    files = [path for place in places for path in sorted([place, *place.rglob("*")]) if path.is_file()]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:12]


def _read() -> dict:
    return json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
