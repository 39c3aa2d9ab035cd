"""Pictures on demand from a store: what of an order moves the latents, and what must not move a bit of them."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import adapters

from flux2_relay import cache
from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages import folders, measure, spec
from flux2_relay.stages.train import drawing, forward_layout
from flux2_relay.stages.train.drawing import DrawingJob, Order
from flux2_relay.stages.train.forward_layout import DrawingLoad
from flux2_relay.stages.train.options import MemoryOptions

ROWS = 48 + 16


@pytest.fixture
def job(encoded_store: Path, dev: Path, tmp_path: Path) -> DrawingJob:
    """One picture of the first preview prompt, with one adapter at strength 1."""
    store = cache.open(encoded_store)
    body = store.sets()[0].body
    of = spec.from_checkpoint(dev).transformer
    file = adapters.write(tmp_path / "a.safetensors", adapters.factors(of, 2, seed=5))
    memory = MemoryOptions(bits=32)
    order = Order(
        latents=tmp_path / "out/one.safetensors",
        context=body["prompts"][0]["text"],
        negative=None,
        references=(),
        size=(64, 64),
        seed=7,
        steps=2,
        guidance=3.0,
        strengths=(1.0,),
        told={"prompt": "a blue dog"},
    )
    return DrawingJob(
        store=store,
        body=body,
        orders=[order],
        adapters=[file],
        memory=memory,
        dtype="float32",
        layout=layout(dev, memory),
        say=lambda sentence: None,
    )


def layout(dev: Path, memory: MemoryOptions):
    load = DrawingLoad(rows=ROWS, adapter_bytes=1 << 16, dtype="float32")
    return forward_layout.choose(spec.from_checkpoint(dev).transformer, load, memory)


def draw(job: DrawingJob, dev: Path, *orders: Order) -> list[np.ndarray]:
    """The latents of these orders."""
    drawing.draw_all(replace(job, orders=orders), folders.find(str(dev)), spec.from_checkpoint(dev).transformer)
    found = []
    for order in orders:
        values = mx.load(str(order.latents))
        assert isinstance(values, dict)
        found.append(np.array(values["latents"]))
    return found


def variants(job: DrawingJob, **changes: dict) -> list[Order]:
    return [replace(job.orders[0], latents=job.orders[0].latents.with_stem(n), **of) for n, of in changes.items()]


def test_at_scale_0_the_latents_are_the_bases_own(job: DrawingJob, dev: Path) -> None:
    with_adapter = draw(
        job, dev, *variants(job, zero={"strengths": (0.0,)}, one={"strengths": (1.0,)}, again={"strengths": (0.0,)})
    )
    (base,) = draw(replace(job, adapters=[]), dev, *variants(job, base={"strengths": ()}))
    np.testing.assert_array_equal(with_adapter[0], base)
    np.testing.assert_array_equal(with_adapter[2], base)
    assert np.abs(with_adapter[1] - base).max() > 1e-2


def test_a_scale_is_a_factor_of_alpha(job: DrawingJob, dev: Path, tmp_path: Path) -> None:
    of = spec.from_checkpoint(dev).transformer
    halved = adapters.write(tmp_path / "half.safetensors", adapters.factors(of, 2, seed=5), alpha=1.0)  # of rank 2
    (half,) = draw(job, dev, *variants(job, half={"strengths": (0.5,)}))
    (other,) = draw(replace(job, adapters=[halved]), dev, *variants(job, other={"strengths": (1.0,)}))
    np.testing.assert_array_equal(half, other)


def test_seed_guidance_and_size_count(job: DrawingJob, dev: Path) -> None:
    one, seed, guidance, wide = draw(
        job, dev, *variants(job, one={}, seed={"seed": 8}, guidance={"guidance": 1.0}, wide={"size": (96, 64)})
    )
    assert np.abs(one - seed).max() > 1e-2
    assert np.abs(one - guidance).max() > 1e-4
    assert wide.shape == (4, 6, 128)


def test_streamed_blocks_draw_the_same_bits(job: DrawingJob, dev: Path) -> None:
    resident, streamed = variants(job, resident={}, streamed={})
    (expected,) = draw(job, dev, resident)
    memory = MemoryOptions(bits=32, stream="always")
    small = replace(job, memory=memory, layout=layout(dev, memory))
    assert small.layout.resident == 0
    np.testing.assert_array_equal(draw(small, dev, streamed)[0], expected)


def test_what_is_there_is_not_drawn_again(job: DrawingJob, dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = job.orders[0]
    draw(job, dev, order)
    before = order.latents.stat().st_mtime_ns
    monkeypatch.setattr(drawing, "load_transformer", lambda *_: pytest.fail("the transformer was loaded"))
    draw(job, dev, order)
    assert order.latents.stat().st_mtime_ns == before


def test_a_picture_that_is_not_finite_is_not_written(job: DrawingJob, dev: Path) -> None:
    (order,) = variants(job, broken={"strengths": (1e38,)})
    with pytest.raises(RelayError, match="smaller scale"):
        draw(job, dev, order)
    assert not order.latents.exists()


def test_identities_follow_the_weights(dev: Path, klein: Path) -> None:
    one, other = (
        drawing.identity_of(folders.find(str(f)), spec.from_checkpoint(f).transformer, print) for f in (dev, klein)
    )
    assert one != other
    assert one == drawing.identity_of(folders.find(str(dev)), spec.from_checkpoint(dev).transformer, pytest.fail)


# Memory


def test_less_budget_means_fewer_resident_blocks(dev: Path) -> None:
    whole = layout(dev, MemoryOptions(bits=32, budget=10**9))
    least = layout(dev, MemoryOptions(bits=32, stream="always", budget=10**9))
    assert not whole.streamed
    tight = layout(dev, MemoryOptions(bits=32, budget=least.peak_bytes))
    assert tight.streamed
    assert tight.peak_bytes <= least.peak_bytes < whole.peak_bytes
    with pytest.raises(InputError, match=r"memory\.budget: .* is too little to draw"):
        layout(dev, MemoryOptions(bits=32, budget=least.peak_bytes // 2))


def test_the_peak_is_about_what_was_predicted(job: DrawingJob, dev: Path) -> None:
    """The tiny model's own arrays are small: the limit is that of a rough prediction, to either side."""
    said: list[str] = []
    peaks: list[int] = []
    job = replace(job, say=lambda sentence: (said.append(sentence), peaks.append(measure.peak_bytes()))[0])
    draw(job, dev, *variants(job, one={}, two={"seed": 8}))
    assert "predicted peak" in said[0]
    assert "all blocks resident" in said[0]
    assert 0.6 < peaks[-1] / job.layout.peak_bytes < 1.25
