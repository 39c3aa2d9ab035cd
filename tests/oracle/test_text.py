"""Captions -> context, against diffusers' own `encode_prompt` on transformers' models."""

import numpy as np
import pytest
from oracle.reference import Reference
from tiny import ours
from tiny.captions import CAPTIONS
from tiny.compare import CONTEXT, assert_near


@pytest.fixture(scope="module")
def contexts(reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """All captions in one batch: ours, and the reference's."""
    captions = list(CAPTIONS.values())
    return ours.context(reference.folder, captions), reference.context(captions)


@pytest.mark.parametrize("name", CAPTIONS)
def test_context_in_a_batch(contexts: tuple[np.ndarray, np.ndarray], name: str) -> None:
    index = list(CAPTIONS).index(name)
    actual, expected = (of_batch[index] for of_batch in contexts)
    assert_near(actual, expected, CONTEXT, name)


@pytest.mark.parametrize("name", ["unicode", "empty", "long"])
def test_context_of_one_caption_alone(reference: Reference, name: str) -> None:
    captions = [CAPTIONS[name]]
    assert_near(ours.context(reference.folder, captions), reference.context(captions), CONTEXT, name)


def test_no_two_captions_give_the_same_context(contexts: tuple[np.ndarray, np.ndarray]) -> None:
    """Guards the guard: captions that the tiny vocabulary could not tell apart would prove nothing."""
    _, expected = contexts
    for index, one in enumerate(expected):
        assert all(np.abs(one - other).max() > 1e-2 for other in expected[:index])
