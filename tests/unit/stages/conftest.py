"""Uncompiled unless a test asks otherwise."""

import pytest


@pytest.fixture(autouse=True)
def _plain(_uncompiled: None) -> None:
    pass
