"""Text and pictures against the recorded results of transformers and diffusers."""

from tiny import ours
from tiny.captions import CAPTIONS
from tiny.compare import CONTEXT, PIXELS, assert_near
from tiny.golden import Golden, unpack_context


def test_contexts_equal_encode_prompt(golden: Golden) -> None:
    names = golden.children("context/")
    actual = ours.context(golden.folder, [CAPTIONS[name] for name in names])
    for name, rows in zip(names, actual, strict=True):
        expected = unpack_context(golden.arrays[f"context/{name}"], len(rows))
        assert_near(rows, expected, CONTEXT, name)


def test_a_caption_alone_is_what_it_is_in_a_batch(golden: Golden) -> None:
    actual = ours.context(golden.folder, [CAPTIONS["unicode"]])[0]
    expected = unpack_context(golden.arrays["context/unicode"], len(actual))
    assert_near(actual, expected, CONTEXT)


def test_latents_equal_the_pipelines(golden: Golden) -> None:
    for size in golden.children("picture/"):
        given = golden.under(f"picture/{size}/")
        assert_near(ours.latents(golden.folder, given["images"]), given["latents"], PIXELS, size)


def test_decoded_pixels_equal_the_pipelines(golden: Golden) -> None:
    for size in golden.children("picture/"):
        given = golden.under(f"picture/{size}/")
        assert_near(ours.images(golden.folder, given["latents"]), given["decoded"], PIXELS, size)
