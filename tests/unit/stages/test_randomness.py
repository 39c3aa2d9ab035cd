"""Random numbers as functions of what they are for. Changing any of these values breaks every run under way."""

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.stages.train import randomness


def test_values_are_fixed_for_ever() -> None:
    assert randomness.number(0, "noise", 1, 2) == 18350728886177883094
    assert randomness.uniform(0, "sigma", 1, 2) == 0.4763312944357737
    assert randomness.shuffled(8, 0, "passes", 1) == [6, 0, 7, 4, 5, 1, 2, 3]
    normal = mx.random.normal((3,), key=randomness.key(7, "noise", 0, 0))
    np.testing.assert_allclose(
        np.array(normal), [-0.7861418128013611, -1.0629699230194092, 0.6915932893753052], rtol=1e-6
    )


def test_every_part_and_its_type_and_place_matter() -> None:
    parts = [(0,), (1,), ("1",), (1, 1), (11,), ("1", 1), (1, "a"), ("a", 1), ("a",), ("", "a")]
    assert len({randomness.number(*p) for p in parts}) == len(parts)
    assert len({str(randomness.key(*p).tolist()) for p in parts}) == len(parts)


def test_a_number_does_not_depend_on_what_was_drawn_before() -> None:
    forward = [randomness.uniform(5, "sigma", step, 0) for step in range(9)]
    mx.random.normal((4,))
    assert [randomness.uniform(5, "sigma", step, 0) for step in reversed(range(9))] == forward[::-1]


def test_uniform_is_uniform() -> None:
    values = np.sort([randomness.uniform(0, "sigma", step, 0) for step in range(4000)])
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    assert np.abs(values - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)


@pytest.mark.parametrize("extreme", [0, 2**64 - 1])
def test_uniform_never_reaches_its_ends(extreme: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "number", lambda *_: extreme)
    assert 0 < randomness.uniform(0) < 1


def test_shuffled_is_a_permutation_that_changes() -> None:
    first, second = (randomness.shuffled(50, 0, "items", epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert randomness.shuffled(0, 0) == []
