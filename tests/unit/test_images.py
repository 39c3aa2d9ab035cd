"""From file to pixels: every trap that Pillow sets."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.encode.images import (
    Placement,
    image_size,
    read_header,
    read_picture,
    read_pixels,
)

ORIENTATION = 0x0112


def levels(path: Path, background: str = "#ffffff") -> np.ndarray:
    return np.asarray(read_picture(path, background)).astype(int)


def save(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(width: int = 48, height: int = 32) -> Image.Image:
    """Four flat corners of different colours: lossy formats keep them, every turn moves them."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (200, 30, 30)
    pixels[: height // 2, width // 2 :] = (30, 200, 30)
    pixels[height // 2 :, : width // 2] = (30, 30, 200)
    return Image.fromarray(pixels)


def whole(width: int, height: int) -> Placement:
    return Placement(resize=(width, height), crop=(0, 0, width, height))


# What a file holds


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_exif_orientation_is_applied_to_size_and_pixels(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(photo(), tmp_path / f"a.{suffix}", exif=exif)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = photo().transpose(turns[orientation]) if orientation > 1 else photo()
    assert image_size(path) == upright.size
    assert np.abs(levels(path) - np.asarray(upright)).mean() < 8  # lossy formats; a wrong turn is off by 50 and more


def test_exif_behind_the_pixels_of_a_png_counts_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = save(photo(48, 32), tmp_path / "a.png").read_bytes()
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end = data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:end] + chunk + data[end:])
    assert image_size(tmp_path / "a.png") == (32, 48)
    assert read_picture(tmp_path / "a.png").size == (32, 48)


def test_the_size_is_read_without_decoding(tmp_path: Path) -> None:
    path = save(Image.fromarray(noise(64, 48)), tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:2000])  # the header is whole, the pixels are not
    assert image_size(path) == (64, 48)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    grey = np.full((16, 16), 32896, np.uint16)
    grey[0, 0], grey[0, 1], grey[0, 2], grey[0, 4] = 0, 65535, 257, 255  # 255/257 is nearer to 1 than to 0
    pixels = levels(save(Image.fromarray(grey), tmp_path / f"a.{suffix}"))
    assert pixels[0, :5, 0].tolist() == [0, 255, 1, 128, 1]
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_16_bit_grey_with_a_transparent_level(tmp_path: Path) -> None:
    grey = np.full((16, 16), 65535, np.uint16)
    grey[0, 0] = 5
    path = save(Image.fromarray(grey), tmp_path / "a.png", transparency=5)
    assert read_header(path).transparent
    assert levels(path, "#0000ff")[0, :2].tolist() == [[0, 0, 255], [255, 255, 255]]


def test_32_bit_numbers_are_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.zeros((16, 16), np.float32)), tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep\.tif: holds 32-bit numbers"):
        read_picture(path)


def test_transparent_pixels_show_the_background_not_what_hides_under_them(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[...] = (255, 0, 0, 0)  # transparent red
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (0, 0, 0, 51)  # a fifth of black
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert read_header(path).transparent
    assert levels(path)[0, :3].tolist() == [[10, 20, 30], [204, 204, 204], [255, 255, 255]]
    assert levels(path, "#00ff00")[1, 1].tolist() == [0, 255, 0]


def test_grey_with_alpha(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 2), np.uint8)
    pixels[0, 0] = (40, 255)
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert levels(path, "#ff8000")[0, :2].tolist() == [[40, 40, 40], [255, 128, 0]]


@pytest.mark.parametrize("alpha", [1, bytes([255, 0, 255])])
def test_palettes_with_transparency(tmp_path: Path, alpha: int | bytes) -> None:
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    picture.putpixel((0, 0), 2)
    path = save(picture, tmp_path / "a.png", transparency=alpha)
    assert read_header(path).transparent
    assert levels(path, "#ffffff")[0, :2].tolist() == [[0, 0, 255], [255, 255, 255]]


def test_plain_palettes_black_and_white_and_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([9, 8, 7])
    assert levels(save(palette, tmp_path / "p.png"))[0, 0].tolist() == [9, 8, 7]
    assert levels(save(Image.new("1", (16, 16), 1), tmp_path / "1.png"))[0, 0].tolist() == [255, 255, 255]
    keyed = save(Image.new("RGB", (16, 16), (1, 2, 3)), tmp_path / "k.png", transparency=(1, 2, 3))
    assert levels(keyed, "#0a0b0c")[0, 0].tolist() == [10, 11, 12]


@pytest.mark.parametrize("name", ["opaque.png", "photo.jpg"])
def test_an_opaque_picture_has_no_transparency(tmp_path: Path, name: str) -> None:
    assert not read_header(save(photo(), tmp_path / name)).transparent


# Colour profiles


def rgb_profile(swapped: bool) -> bytes:
    """sRGB, or sRGB with the red and blue primaries exchanged, which is easy to tell."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    if swapped:
        red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
        profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_profile_is_converted_to_srgb(tmp_path: Path, suffix: str) -> None:
    options = {"quality": 100, "lossless": True} if suffix == "webp" else {}
    options |= {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = tmp_path / f"a.{suffix}"
    save(Image.new("RGB", (16, 16), (250, 40, 20)), path, icc_profile=rgb_profile(swapped=True), **options)
    assert np.abs(levels(path)[8, 8] - (20, 40, 250)).max() <= 3


def test_srgb_itself_changes_no_level(tmp_path: Path) -> None:
    pixels = noise(64, 64)
    path = save(Image.fromarray(pixels), tmp_path / "a.png", icc_profile=rgb_profile(swapped=False))
    assert (levels(path) == pixels).all()


def test_a_profile_also_holds_for_palettes_alpha_and_grey_files(tmp_path: Path) -> None:
    profile = rgb_profile(swapped=True)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([250, 40, 20])
    clear = Image.new("RGBA", (16, 16), (250, 40, 20, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    for picture in (palette, clear):
        path = save(picture, tmp_path / "a.png", icc_profile=profile)
        assert np.abs(levels(path)[8, 8] - (20, 40, 250)).max() <= 2
    assert levels(path, "#fa2814")[0, 0].tolist() == [250, 40, 20]  # the background is sRGB already
    grey = save(Image.new("L", (16, 16), 77), tmp_path / "g.png", icc_profile=rgb_profile(swapped=False))
    assert levels(grey)[0, 0].tolist() == [77, 77, 77]


@pytest.mark.parametrize("profile", [b"not a profile", b"\0" * 200, rgb_profile(swapped=True)[:300]])
def test_a_broken_profile_is_ignored(tmp_path: Path, profile: bytes) -> None:
    path = save(Image.new("RGB", (16, 16), (250, 40, 20)), tmp_path / "a.png", icc_profile=profile)
    assert levels(path)[0, 0].tolist() == [250, 40, 20]


def cmyk_profile() -> bytes:
    """A small press profile: CMYK to Lab by a table of 2 x 2 x 2 x 2 points, black ink far from black."""
    corners = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), -1).reshape(16, 4)
    light = 100 - corners @ np.array([15.0, 20.0, 5.0, 30.0])
    lab = np.stack([light * 655.35 * 0.996, np.full(16, 32768.0), np.full(16, 32768.0)], -1)
    ramp = np.array([0, 65535], ">u2").tobytes()
    identity = np.array([65536, 0, 0, 0, 65536, 0, 0, 0, 65536], ">i4").tobytes()
    table = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + identity + struct.pack(">HH", 2, 2)
    table += ramp * 4 + lab.astype(">u2").tobytes() + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    text = b"desc" + bytes(4) + struct.pack(">I", 6) + b"press\0" + bytes(78)
    copyright_ = b"text" + bytes(4) + b"none\0"
    tags, data, offset = b"", b"", 132 + 12 * 4
    for name, value in ((b"A2B0", table), (b"wtpt", white), (b"desc", text), (b"cprt", copyright_)):
        value += bytes(-len(value) % 4)
        tags += name + struct.pack(">II", offset + len(data), len(value))
        data += value
    head = struct.pack(">I4sI4s4s4s", offset + len(data), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", 4) + tags + data


def test_cmyk_goes_through_its_profile(tmp_path: Path) -> None:
    black_ink = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
    plain = levels(save(black_ink, tmp_path / "plain.tif"))[0, 0]
    press = levels(save(black_ink, tmp_path / "press.tif", icc_profile=cmyk_profile()))[0, 0]
    assert plain.tolist() == [0, 0, 0]  # without a profile there is nothing but the plain inversion
    # 30 lightness units below white; black-point compensation stretches the darkest ink (L* 30) to black.
    assert 100 < press[0] < 190
    assert np.ptp(press) <= 3


def test_a_cmyk_jpeg_is_read(tmp_path: Path) -> None:
    path = save(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), tmp_path / "a.jpg", quality=100)
    assert np.abs(levels(path)[0, 0] - (0, 255, 255)).max() <= 2


# What is refused


def refusal(path: Path) -> str:
    """The sentence of whichever refuses first; what a header shows must be refused before decoding."""

    def read() -> None:
        read_header(path)
        read_picture(path)

    with pytest.raises(InputError) as error:
        read()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "avif"])
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(Image.fromarray(noise(64, 64)), tmp_path / f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "cannot be read as a picture" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no.png"
    path.write_bytes(content)
    assert "cannot be read as a picture" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "gone.png")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "avif"])
def test_more_than_one_frame_is_refused(tmp_path: Path, suffix: str) -> None:
    frames = [photo(), photo().transpose(Image.Transpose.ROTATE_180)]
    path = save(frames[0], tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    assert "holds 2 frames" in refusal(path)


def test_a_photograph_with_a_preview_behind_it_is_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    photo().save(path, format="MPO", save_all=True, append_images=[photo(24, 16)])
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 2  # what a plain frame count would refuse
    assert read_picture(path).size == (48, 32)


@pytest.mark.parametrize(("width", "height"), [(15, 400), (400, 15), (1, 1)])
def test_a_picture_below_16_pixels_is_refused(tmp_path: Path, width: int, height: int) -> None:
    assert f"{width} x {height} pixels" in refusal(save(Image.new("RGB", (width, height)), tmp_path / "a.png"))


@pytest.mark.parametrize(("width", "height"), [(16384, 16385), (60000, 60000)])
def test_a_picture_above_the_limit_is_refused(tmp_path: Path, width: int, height: int) -> None:
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    assert "more than 268435456 pixels" in refusal(path)


# Pixels


def test_levels_become_floats_from_minus_one_to_one(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = read_pixels(save(Image.fromarray(ramp), tmp_path / "a.png"), whole(16, 16))
    assert pixels.dtype == np.float32
    assert pixels.shape == (16, 16, 3)
    assert (pixels[..., 0] == (2 * ramp.astype(np.float32) / 255 - 1)).all()


def test_resize_is_lanczos_then_crop_then_flip(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(80, 60))
    path = save(picture, tmp_path / "a.png")
    placement = Placement(resize=(43, 32), crop=(7, 0, 32, 32), flip=True)
    expected = picture.resize((43, 32), Image.Resampling.LANCZOS).crop((7, 0, 39, 32))
    expected = np.asarray(expected)[:, ::-1].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(read_pixels(path, placement), expected, atol=1e-6)


def test_the_edge_of_transparency_does_not_take_on_hidden_colours(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 0] = 255  # red, everywhere, seen nowhere
    pixels[:, :31] = (255, 255, 255, 255)
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert (read_pixels(path, whole(16, 16)) == 1).all()
