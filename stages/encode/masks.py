"""Masks: which rows of a picture's latents the loss looks at, and how much.

Letters: H W rows and columns of the cropped picture. A mask goes the way of its picture (resize, crop, flip); then
each latent position gets the mean over the 16 x 16 pixels that it stands for.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode import images
from flux2_relay.stages.encode.images import STEP, Placement, Size

Channel = Literal["grey", "alpha"]

NUMERICS = 1  # part of every key: raise it when the same file would give another mask
_SHAPE_TOLERANCE = 0.02  # of the ratio of width to height: masks are saved smaller, and rounded


def read_mask(path: Path, placement: Placement, channel: Channel) -> np.ndarray:
    """The mask of a picture's latents: [H/16, W/16] float32 in [0, 1], 1 where it is trained on.

    ``grey``: the brightness of the file, transparent pixels black; ``alpha``: its opacity. InputError where nothing
    is left to train on.
    """
    grey = images.read_alpha(path) if channel == "alpha" else images.read_picture(path, "#000000").convert("L")
    if grey is None:
        raise InputError(f"{path}: has no transparency any more; was it saved anew meanwhile?")
    x, y, w, h = placement.crop
    cropped = grey.resize(placement.resize, Image.Resampling.BOX).crop((x, y, x + w, y + h))
    pixels = np.asarray(cropped, dtype=np.float32) / np.float32(255)
    mask = pixels.reshape(h // STEP, STEP, w // STEP, STEP).mean(axis=(1, 3))
    if not mask.any():
        where = "transparent" if channel == "alpha" else "black"
        raise InputError(
            f"{path}: the mask is {where} wherever the picture is kept, so nothing would be trained; "
            "correct the mask or take the picture out"
        )
    return np.ascontiguousarray(mask[:, ::-1] if placement.flip else mask)


def check_shape(path: Path, mask: Size, picture: Size) -> None:
    """Refuse a mask of another shape than its picture; another size is fine."""
    (w, h), (width, height) = mask, picture
    if abs(w * height / (h * width) - 1) > _SHAPE_TOLERANCE:
        raise InputError(
            f"{path}: is {w} x {h} pixels, but the picture that it masks is {width} x {height}; "
            "save both with the same shape"
        )


def mask_key(source: str, placement: Placement, channel: Channel) -> dict[str, object]:
    """The object whose hash names a mask; ``source``: sha256 of the file that it is read from."""
    return {
        "kind": "masks",
        "format": 1,
        "source": source,
        "channel": channel,
        "decode": images.DECODE,
        "resize": [*placement.resize, "box"],
        "crop": list(placement.crop),
        "flip": placement.flip,
        "numerics": NUMERICS,
    }
