"""From an image file to the pixels that the VAE sees, and where they are cut from it.

Letters: H W rows and columns. Sizes are (width, height), as Pillow has them; arrays are [H, W, 3].
The order is fixed: open, EXIF orientation, colour profile to sRGB, transparency laid on the background,
resize to cover the bucket, crop, flip, float. Where a picture is cut follows from its size alone, so
everything can be planned (and every key computed) without decoding one.
"""

import hashlib
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from flux2_relay.cache.errors import InputError

Size = tuple[int, int]
Crop = Literal["center", "top", "random"]

STEP = 16  # pixels behind one latent position
DECODE = 1  # part of every key: raise it when the same file would give other pixels
NUMERICS = 1  # part of every key: raise it when the VAE's own code changes its numbers on purpose
PIXEL_LIMIT = 2**28  # 16384 x 16384; Pillow's own limit of 89 megapixels refuses today's cameras
_LADDER_STEP = 64
_ORIENTATION = 0x0112

Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a file says of its picture before it is decoded: upright size, and whether it has transparency."""

    width: int
    height: int
    transparent: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the pixels come from: resize the upright picture, cut this box out, mirror it or not."""

    resize: Size
    crop: tuple[int, int, int, int]  # x, y, width, height inside the resized picture
    flip: bool = False


@lru_cache
def buckets(resolution: int) -> tuple[Size, ...]:
    """Every size that pictures of the area budget R x R are cut to, sorted.

    resolution R -> (width, height), both multiples of 16, aspect ratios up to about 4:1. For each width
    from R/2 to R the height is the largest that stays inside the budget; then the same transposed.
    """
    if resolution < STEP:
        raise InputError(f"a resolution of {resolution} is too small; the smallest is {STEP}")
    sizes: set[Size] = set()
    for width in range(max(STEP, _floor(resolution // 2)), resolution + 1, STEP):
        height = _floor(resolution * resolution // width)
        sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


@lru_cache(maxsize=1 << 16)  # pictures of a data set share a few sizes
def choose_bucket(width: int, height: int, resolution: int, upscale: bool) -> Size:
    """The bucket of a picture: (width, height) pixels and a budget -> (width, height).

    Without ``upscale`` a picture that its bucket would enlarge gets the bucket of the largest smaller
    resolution that fits inside it; those tried are a fixed ladder, so that small pictures share buckets too.
    """
    if min(width, height) < STEP:
        raise InputError(f"the picture has {width} x {height} pixels; the smallest is {STEP} x {STEP}")
    for rung in [resolution] if upscale else _ladder(resolution):
        best = _nearest(width, height, rung)
        if upscale or (best[0] <= width and best[1] <= height):
            return best
    return STEP, STEP


def _nearest(width: int, height: int, resolution: int) -> Size:
    """The bucket with the least |ln(aspect ratio / its ratio)|; the larger area wins a tie."""

    def distance(bucket: Size) -> tuple[Fraction, int, int]:
        # exp(|ln|) in whole numbers: a ratio and its inverse are equally far, without rounding.
        one, other = width * bucket[1], height * bucket[0]
        return Fraction(max(one, other), min(one, other)), -bucket[0] * bucket[1], bucket[0]

    # Only those that are nearest in floating point are compared exactly, which costs 50 times as much.
    at, ratios = log(width / height), _log_ratios(resolution)
    least = min(abs(at - ratio) for ratio, _ in ratios)
    return min((bucket for ratio, bucket in ratios if abs(at - ratio) <= least + 1e-9), key=distance)


@lru_cache
def _log_ratios(resolution: int) -> tuple[tuple[float, Size], ...]:
    return tuple((log(width / height), (width, height)) for width, height in buckets(resolution))


def _ladder(resolution: int) -> list[int]:
    """R, R-64, R-128 and so on down to 64, then in steps of 16 to 16."""
    coarse = list(range(resolution, 4 * STEP - 1, -_LADDER_STEP)) or [resolution]
    return coarse + list(range(_floor(coarse[-1] - 1), STEP - 1, -STEP))


def _floor(pixels: int) -> int:
    return pixels // STEP * STEP


def place(size: Size, bucket: Size, crop: Crop = "center", flip: bool = False, draw: str = "") -> Placement:
    """How a picture of ``size`` fills ``bucket``: resized to cover it, what sticks out cut off.

    ``draw`` decides a ``random`` crop and nothing else; see `crop_draw`.
    """
    (width, height), (w, h) = size, bucket
    if w * height >= h * width:  # the picture is relatively taller than the bucket: its width decides
        resized = w, max(h, _round_half_up(height * w, width))
    else:
        resized = max(w, _round_half_up(width * h, height)), h
    across, down = resized[0] - w, resized[1] - h
    x, y = across // 2, down // 2
    if crop == "top":
        y = 0
    elif crop == "random":
        digest = hashlib.sha256(draw.encode()).digest()
        x = int.from_bytes(digest[:8], "big") % (across + 1)
        y = int.from_bytes(digest[8:16], "big") % (down + 1)
    return Placement(resize=resized, crop=(x, y, w, h), flip=flip)


def crop_draw(seed: int, source: str) -> str:
    """The draw of a random crop: the same seed and file (by its sha256) always give the same crop."""
    return f"{seed}:{source}"


def _round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def read_header(path: Path) -> Header:
    """Size and transparency from the file's header; InputError names a file that cannot be trained on."""
    with _opened(path) as image:
        width, height = image.size
        if image.format != "TIFF" and _orientation(image, path) in (5, 6, 7, 8):  # Pillow turns TIFFs itself
            width, height = height, width
        return Header(width=width, height=height, transparent=image.has_transparency_data)


def image_size(path: Path) -> Size:
    """(width, height) of the upright picture, from its header."""
    header = read_header(path)
    return header.width, header.height


def read_pixels(path: Path, placement: Placement, background: str = "#ffffff") -> np.ndarray:
    """The pixels that the VAE encodes.

    file -> [H, W, 3] float32 in [-1, 1], H and W from the placement's crop. ``background`` ("#rrggbb") is
    what transparent pixels are laid on.
    """
    x, y, w, h = placement.crop
    picture = read_picture(path, background).resize(placement.resize, Image.Resampling.LANCZOS)
    pixels = np.asarray(picture.crop((x, y, x + w, y + h)), dtype=np.float32)
    if placement.flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels / np.float32(127.5) - np.float32(1))


def read_picture(path: Path, background: str = "#ffffff") -> Image.Image:
    """The whole picture as anybody would see it: upright, in sRGB, opaque, mode RGB."""
    with _opened(path) as image:
        profile = image.info.get("icc_profile")
        colour, alpha = _split_alpha(_upright(image, path), path)
    colour = _to_srgb(colour, profile)
    if alpha is not None:
        canvas = Image.new("RGB", colour.size, background)
        canvas.paste(colour, mask=alpha)
        return canvas
    return colour


def read_alpha(path: Path) -> Image.Image | None:
    """The opacity of the upright picture, mode L; None where it has no transparency."""
    with _opened(path) as image:
        return _split_alpha(_upright(image, path), path)[1]


def _upright(image: Image.Image, path: Path) -> Image.Image:
    with _naming(path):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    return image


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises over a damaged file into one sentence that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path}: {_too_large()}") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # plugins raise anything: SyntaxError, struct.error, IndexError, ...
        reason = str(error).replace(repr(str(path)), "it").replace(str(path), "it")
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({reason})"
        raise InputError(
            f"{path}: cannot be read as a picture{why}; the file is empty, damaged, cut off or of another "
            "type: copy it again, convert it to PNG, or take it out"
        ) from error


def _too_large() -> str:
    return f"has more than {PIXEL_LIMIT} pixels (16384 x 16384), the limit; scale it down first"


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The opened file, its header read and found fit."""
    with _naming(path):
        image = Image.open(path)
    with image:
        with _naming(path):
            width, height = image.size
            # A phone's JPEG with a depth map or preview behind it (MPO) is still one photograph.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{path}: holds {frames} frames; save the one to train on as a picture of its own")
        if width * height > PIXEL_LIMIT:
            raise InputError(f"{path}: {_too_large()}")
        if min(width, height) < STEP:
            raise InputError(f"{path}: has {width} x {height} pixels; the smallest is {STEP} x {STEP}")
        yield image


def _orientation(image: Image.Image, path: Path) -> int:
    """The EXIF orientation: 1 is upright, 5 to 8 lie on their side."""
    with _naming(path):
        if image.format == "PNG" and _has_late_metadata(path):
            image.load()  # Pillow reads what stands behind the pixels only with them
        return Image.Image.getexif(image).get(_ORIENTATION, 1)  # PngImageFile's own would decode every PNG


def _has_late_metadata(path: Path) -> bool:
    """Whether a PNG carries EXIF or XMP behind its pixels, where some editors put them."""
    with open(path, "rb") as file:
        file.seek(8)
        in_pixels = False
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if in_pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            in_pixels = in_pixels or kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
    return False


def _split_alpha(image: Image.Image, path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Colour (mode L, RGB, CMYK or another that has no alpha) and, where there is transparency, alpha (L)."""
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise InputError(
            f"{path}: holds 32-bit numbers (mode {image.mode}), whose range is not defined; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        grey = image.mode in ("LA", "La", "L", "1")
        bands = image.convert("LA" if grey else "RGBA")
        return bands.convert("L" if grey else "RGB"), bands.getchannel("A")
    return image.convert("RGB" if image.mode == "P" else "L") if image.mode in ("P", "1") else image, None


def _from_16_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """65535 is white: Pillow's own conversion would clip at 255. A PNG may name one level as transparent."""
    levels = np.asarray(image).astype(np.uint32)
    colour = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return colour, None
    return colour, Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8))


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """Mode RGB in sRGB; a profile that is broken or for another kind of pixels is ignored, as browsers do."""
    space = _profile_space(profile)
    if profile is None or space is None:
        return colour.convert("RGB")
    if space == "RGB" and colour.mode != "CMYK":
        colour = colour.convert("RGB")
    if {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space) != colour.mode:
        return colour.convert("RGB")
    transform = _transform(profile, colour.mode)
    if transform is None or (colour.mode == "RGB" and _is_identity(transform)):
        return colour.convert("RGB")
    return ImageCms.applyTransform(colour, transform) or colour


def _profile_space(profile: bytes | None) -> str | None:
    """The kind of colours that an ICC profile describes ("RGB", "GRAY", "CMYK" ...), from its header."""
    is_profile = profile is not None and profile[36:40] == b"acsp"
    return profile[16:20].decode("latin-1").strip() if profile and is_profile else None


@lru_cache(maxsize=16)  # a data set has a handful of profiles and thousands of pictures
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From ``profile`` to sRGB, with the intent that image editors use; None where there is no way."""
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a profile is sRGB under whatever name: it moves none of 4096 colours by more than a level."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
    return int(np.abs(moved.astype(int) - grid).max()) <= 1


def latents_key(
    source: str, placement: Placement, background: str | None, *, vae: str, tf32: bool, dtype: str
) -> dict[str, object]:
    """The object whose hash names a picture's latents: everything that they depend on and nothing else.

    ``source``: the file's sha256; ``background``: "#rrggbb", or None for a picture without transparency;
    ``vae``: identity of the encoder half's weights; ``dtype``: what is stored, such as "float16".
    """
    return {
        "kind": "latents",
        "format": 1,
        "vae": vae,
        "source": source,
        "decode": DECODE,
        "background": background,
        "resize": [*placement.resize, "lanczos"],
        "crop": list(placement.crop),
        "flip": placement.flip,
        "compute": "float32",
        "tf32": tf32,
        "dtype": dtype,
        "numerics": NUMERICS,
    }
