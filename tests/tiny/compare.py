"""One measure for every numeric test: whole arrays, the largest error over the largest value."""

from collections.abc import Mapping

import numpy as np

CONTEXT = 2e-4
"""Limit for text: thirty layers, and angles rounded at other absolute positions."""
PIXELS = 2e-5
"""Limit for latents and decoded images."""
VELOCITY = 5e-6
"""Limit for the transformer's output."""
GRADIENT = 5e-5
"""Limit for the gradient of each adapter factor."""
LOSSES = 1e-4
"""Limit for each loss of a training, relative to itself."""
TRAINED = 1e-3
"""Limit for the factors after a training."""


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |actual - expected| / max |expected|, in float64; two arrays of zeros differ by 0."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0)
    return float(difference / largest) if (largest := np.abs(expected).max(initial=0)) else float(difference)


def assert_near(actual: np.ndarray, expected: np.ndarray, limit: float, what: str = "") -> None:
    """Fail unless `actual` has the shape of `expected` and its relative error is below `limit`."""
    error = relative_error(actual, expected)
    assert error < limit, f"{what} differs by {error:.2e}, limit {limit:.0e}"


def assert_all_near(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], limit: float) -> None:
    """The same for two sets of named arrays; every name must be in both, every fault is listed."""
    assert set(actual) == set(expected), f"only on one side: {sorted(set(actual) ^ set(expected))}"
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error < limit}
    assert not wrong, f"{len(wrong)} of {len(errors)} differ by {limit:.0e} or more: {wrong}"
