"""Whether two adapters are the same update of every weight, without forming a single one of those weights.

The difference of two products is one product: s B A - s' B' A' = [s B, -s' B'] [A; A'] = P Q, and its Frobenius norm
is the root of the sum of (P^T P) * (Q Q^T), two matrices of a few rows. In float64 that finds differences down to 1e-8
of an update, far below what is asked.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flux2_relay.stages.train.adapter_file import Factors


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference between two adapters: norm of the difference over that of the update, and where."""

    error: float
    module: str


def largest(expected: Mapping[str, Factors], found: Mapping[str, Factors]) -> Difference:
    """The module whose update differs most, of those in either; a module in one alone counts as zero in the other."""
    errors = {path: _difference(expected.get(path), found.get(path)) for path in {**expected, **found}}
    module = max(errors, key=lambda path: (math.isnan(errors[path]), errors[path]))
    return Difference(errors[module], module)


def is_zero(factors: Mapping[str, Factors]) -> bool:
    """Whether no module changes anything: every B is zero, as before the first step."""
    return all(not np.any(np.asarray(part.b)) for part in factors.values())


def not_finite(factors: Mapping[str, Factors]) -> list[str]:
    """The modules in which something is no finite number."""
    return [
        path
        for path, part in factors.items()
        if not (np.isfinite(np.asarray(part.a)).all() and np.isfinite(np.asarray(part.b)).all())
    ]


def _difference(expected: Factors | None, found: Factors | None) -> float:
    """Relative to what is expected; infinite where nothing is and something was found."""
    if expected is not None and found is not None and _is_same(expected, found):
        return 0.0
    size, distance = _norm(expected), _norm(expected, found)
    if size == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / size


def _is_same(one: Factors, other: Factors) -> bool:
    pairs = (one.a, other.a), (one.b, other.b)
    return one.scale == other.scale and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _norm(first: Factors | None, second: Factors | None = None) -> float:
    """The Frobenius norm of the first update less the second."""
    there = [(part, sign) for part, sign in ((first, 1), (second, -1)) if part is not None]
    if not there:
        return 0.0
    a = np.concatenate([np.asarray(part.a, np.float64) for part, _ in there])
    b = np.concatenate([sign * part.scale * np.asarray(part.b, np.float64) for part, sign in there], axis=1)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    return math.sqrt(max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0))
