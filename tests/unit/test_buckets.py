"""The buckets, where a picture is cut, and the key of its latents."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import canonical
from flux2_relay.stages.encode import images
from flux2_relay.stages.encode.images import (
    Placement,
    buckets,
    choose_bucket,
    crop_draw,
    latents_key,
    place,
)

# Buckets


@pytest.mark.parametrize("resolution", [16, 64, 100, 512, 768, 1024, 2048])
def test_buckets_fill_the_budget_as_well_as_the_step_allows(resolution: int) -> None:
    sizes, budget = set(buckets(resolution)), resolution * resolution
    assert sizes == {(h, w) for w, h in sizes}
    for w, h in sizes:
        assert w % 16 == 0
        assert h % 16 == 0
        assert w * h <= budget
        assert min(w, h) * (max(w, h) + 16) > budget
    assert {w for w, _ in sizes} >= set(range(max(16, resolution // 2 // 16 * 16), resolution + 1, 16))


def test_buckets_at_1024() -> None:
    sizes = buckets(1024)
    assert len(sizes) == 65
    assert sizes[0] == (512, 2048)
    assert sizes[-1] == (2048, 512)
    assert min(w * h for w, h in sizes) >= 0.988 * 1024**2


def test_a_resolution_below_the_step_is_refused() -> None:
    with pytest.raises(InputError, match="15 is too small"):
        buckets(15)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((4032, 3024), (1184, 880)),
        ((3024, 4032), (880, 1184)),
        ((1920, 1080), (1360, 768)),
        ((3000, 2000), (1248, 832)),
        ((900, 700), (1168, 896)),
        ((5000, 5000), (1024, 1024)),
        ((9000, 300), (2048, 512)),
    ],
)
def test_buckets_of_common_sizes_when_upscaling(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose_bucket(*size, 1024, upscale=True) == bucket


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1920, 1080), (1360, 768)),
        ((900, 700), (864, 672)),  # of the rung 768: 832 would need 944 x 736
        ((511, 511), (448, 448)),
        ((100, 100), (64, 64)),
        ((63, 63), (48, 48)),
        ((16, 16), (16, 16)),
        ((16, 300), (16, 144)),
    ],
)
def test_small_pictures_are_not_enlarged_unless_asked(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose_bucket(*size, 1024, upscale=False) == bucket


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([64, 100, 512, 1024]))
def test_the_bucket_is_the_nearest_in_log_aspect_and_fits(width: int, height: int, resolution: int) -> None:
    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log((width / height) / (bucket[0] / bucket[1])))

    best = choose_bucket(width, height, resolution, upscale=True)
    assert distance(best) <= min(map(distance, buckets(resolution))) + 1e-12
    w, h = choose_bucket(width, height, resolution, upscale=False)
    assert w <= width
    assert h <= height
    assert choose_bucket(height, width, resolution, upscale=False) == (h, w)


# Placement


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(16, 5000), st.integers(16, 5000)),
    st.sampled_from(["center", "top", "random"]),
    st.text(),
)
def test_the_resized_picture_covers_the_crop_and_no_more(size: tuple[int, int], crop: images.Crop, draw: str) -> None:
    w, h = choose_bucket(*size, 512, upscale=True)
    placement = place(size, (w, h), crop, draw=draw)
    (width, height), (x, y, *box) = placement.resize, placement.crop
    assert box == [w, h]
    assert width == w or height == h
    assert 0 <= x <= width - w
    assert 0 <= y <= height - h
    scale = max(w / size[0], h / size[1])
    assert abs(width - size[0] * scale) <= 0.5 + 1e-9 or width == w
    assert abs(height - size[1] * scale) <= 0.5 + 1e-9 or height == h


def test_where_the_crop_lies() -> None:
    tall, bucket = (600, 1000), (512, 512)
    assert place(tall, bucket).resize == (512, 853)
    assert place(tall, bucket).crop == (0, 170, 512, 512)
    assert place(tall, bucket, "top").crop == (0, 0, 512, 512)
    assert place((1000, 600), bucket, "top").crop == (170, 0, 512, 512)


def test_a_random_crop_depends_on_seed_and_file_alone() -> None:
    def at(seed: int, source: str) -> int:
        return place((600, 1000), (512, 512), "random", draw=crop_draw(seed, source)).crop[1]

    assert at(0, "ab") == at(0, "ab")
    rows = {at(seed, source) for seed in range(10) for source in ("ab", "cd", "ef")}
    assert len(rows) > 20
    assert min(rows) < 60
    assert max(rows) > 280


# The key


def key(**changes: object) -> dict[str, object]:
    placement = Placement(resize=(853, 512), crop=(170, 0, 512, 512), flip=False)
    options = {"vae": "v", "tf32": False, "dtype": "float16"} | changes
    return latents_key("s", placement, None, **options)  # type: ignore[arg-type]


def test_the_key_of_latents() -> None:
    assert key() == {
        "kind": "latents",
        "format": 1,
        "vae": "v",
        "source": "s",
        "decode": 1,
        "background": None,
        "resize": [853, 512, "lanczos"],
        "crop": [170, 0, 512, 512],
        "flip": False,
        "compute": "float32",
        "tf32": False,
        "dtype": "float16",
        "numerics": 1,
    }
    canonical(key())  # raises for what cannot be hashed
    assert len({canonical(k) for k in (key(), key(vae="w"), key(tf32=True), key(dtype="float32"))}) == 4
