"""Work in a process of its own: what comes back of it, and what is said where nothing does."""

import os
import signal
import sys

import pytest

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.pipeline import apart, wish


def test_what_it_returns_comes_back_from_another_process() -> None:
    assert apart.run(os.getpid) != os.getpid()


def test_an_error_of_the_house_is_raised_here() -> None:
    with pytest.raises(InputError, match="--size wide: write width and height"):
        apart.run(wish.parse_size, "wide")


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(RelayError, match=r"signal 9.*memory"):
        apart.run(signal.raise_signal, signal.SIGKILL)


def test_a_process_that_leaves_without_a_word_is_told() -> None:
    with pytest.raises(RelayError, match="status 3"):
        apart.run(sys.exit, 3)
