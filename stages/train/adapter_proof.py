"""Whether two adapters are the same update of every weight, without forming a single one of those weights.

What is compared is the Frobenius norm of the difference, by the algebra of each kind (`updates.py` and beside it). In
float64 that finds differences down to 1e-8 of an update, far below what is asked.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flux2_relay.stages.train.updates import Update, Updates


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference between two adapters: norm of the difference over that of the update, and where."""

    error: float
    module: str


def largest(expected: Updates, found: Updates) -> Difference:
    """The module whose update differs most, of those in either; a module in one alone counts as zero in the other."""
    errors = {path: _difference(expected.get(path), found.get(path)) for path in {**expected, **found}}
    module = max(errors, key=lambda path: (math.isnan(errors[path]), errors[path]))
    return Difference(errors[module], module)


def is_zero(factors: Updates) -> bool:
    """Whether no module changes anything: it is as before the first step."""
    return all(update.is_zero() for update in factors.values())


def not_finite(factors: Updates) -> list[str]:
    """The modules in which something is no finite number."""
    return [
        path
        for path, update in factors.items()
        if not all(np.isfinite(np.asarray(x.astype(mx.float32))).all() for x in update.arrays())
    ]


def _difference(expected: Update | None, found: Update | None) -> float:
    """Relative to what is expected; infinite where nothing is and something was found."""
    if expected is not None:
        return expected.distance(found)
    return 0.0 if found is None or found.is_zero() else math.inf
