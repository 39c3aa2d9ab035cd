"""Images -> latents -> images, against AutoencoderKLFlux2 through the code of Flux2Pipeline."""

import numpy as np
import pytest
from oracle.reference import Reference
from tiny import ours
from tiny.cases import picture
from tiny.compare import PIXELS, assert_near

SIZES = {"square": (64, 64), "wide": (48, 96), "tall": (112, 32), "one_token": (16, 16)}


@pytest.mark.parametrize("name", SIZES)
def test_latents(reference: Reference, name: str) -> None:
    images = picture(*SIZES[name], seed=1)
    assert_near(ours.latents(reference.folder, images), reference.latents(images), PIXELS, name)


@pytest.mark.parametrize("name", SIZES)
def test_decoded_pixels(reference: Reference, name: str) -> None:
    height, width = SIZES[name]
    latents = np.random.default_rng(2).standard_normal((1, height // 16, width // 16, 128), dtype=np.float32)
    assert_near(ours.images(reference.folder, latents), reference.images(latents), PIXELS, name)


def test_images_of_a_batch_do_not_mix(reference: Reference) -> None:
    images = picture(32, 48, seed=3, batch=3)
    latents = reference.latents(images)
    assert_near(ours.latents(reference.folder, images), latents, PIXELS, "latents")
    assert_near(ours.images(reference.folder, latents), reference.images(latents), PIXELS, "images")
