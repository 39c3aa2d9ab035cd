"""The fixture `golden`: each recorded checkpoint in turn."""

from functools import cache

import pytest
from tiny.golden import Golden


@cache
def read(name: str) -> Golden:
    """One reading of each file serves all tests."""
    return Golden(name)


@pytest.fixture(params=["dev", "klein"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """A tiny checkpoint and what diffusers, transformers, peft and torch made of it; written by `make.py`."""
    return read(request.param)
