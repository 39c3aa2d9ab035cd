"""What a batch may hold beside pictures and captions: references, masks, weights of items."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, ours
from tiny.compare import assert_all_near, assert_near

from flux2_relay import cache
from flux2_relay.stages.train import lora, objective, sample
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.batches import Batches, load_ahead
from flux2_relay.stages.train.contexts import open_contexts, reference_ids
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import TrainOptions
from flux2_relay.stages.train.transformer import Transformer, image_ids

ROWS, GRIDS = 6, ((2, 3), (2, 2), (1, 3))
EXTRAS = ("references", "mask", "item_weight")


@pytest.fixture
def model(dev: Path) -> Transformer:
    model = ours.load(dev)
    ours.attach(model, LoraOptions(rank=2))
    shapes = {name: value.shape for name, value in lora.parameters(model).items()}
    lora.load(model, {name: mx.array(value) for name, value in cases.adapter(shapes, seed=1).items()})
    return model


def drawn(model: Transformer) -> cases.Case:
    return cases.draw(model.spec.context_width, seed=2, text=9, grids=GRIDS, guidance=(1.0, 3.5))


def batch_of(case: cases.Case, *extras: str) -> Batch:
    latents, context, ids, text_ids = ours.tensors(case, "latents", "context", "latent_ids", "text_ids")
    given = {
        "references": latents[:, ROWS:],
        "mask": mx.array([[0, 0.25, 1, 1, 0, 0.5], [1, 0, 0, 0, 0, 0]]),
        "item_weight": mx.array([0.5, 3.0]),
    }
    given = {name: value for name, value in given.items() if name in extras}
    if "references" in extras:
        given["reference_ids"] = ids[ROWS:]
    return Batch(latents=latents[:, :ROWS], context=context, latent_ids=ids[:ROWS], text_ids=text_ids, **given)


@pytest.mark.parametrize("extras", [*[(name,) for name in EXTRAS], EXTRAS])
def test_gradients_equal_autodiff_through_the_whole_model(model: Transformer, extras: tuple[str, ...]) -> None:
    case = drawn(model)
    batch = batch_of(case, *extras)
    sigma, noise, guidance = ours.tensors(case, "sigma", "noise", "guidance")
    noise = noise[:, :ROWS]

    def loss(values: dict[str, mx.array]) -> mx.array:
        lora.load(model, values)
        tokens, ids = objective.add_noise(batch.latents, noise, sigma), batch.latent_ids
        if batch.references is not None and batch.reference_ids is not None:
            tokens = mx.concatenate([tokens, batch.references], axis=1)
            ids = mx.concatenate([ids, batch.reference_ids])
        velocity = model(tokens, batch.context, sigma, guidance, ids, batch.text_ids)[:, :ROWS]
        squared = ((velocity - (noise - batch.latents)) ** 2).mean(axis=-1)
        if batch.mask is not None:
            squared = (squared * batch.mask).sum(axis=1) / batch.mask.sum(axis=1)
        else:
            squared = squared.mean(axis=1)
        return (squared * (1 if batch.item_weight is None else batch.item_weight)).mean()

    values = lora.parameters(model)
    expected_loss, expected = mx.value_and_grad(loss)(values)
    lora.load(model, values)
    found_loss, found = loss_and_gradients(model, batch, sigma, noise, guidance)
    assert float(found_loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_all_near(ours.numpy(found), ours.numpy(expected), 2e-5)
    plain, _ = loss_and_gradients(model, batch_of(case), sigma, noise, guidance)
    assert abs(float(plain) - float(found_loss)) > 1e-4


def test_a_mapping_may_hold_them_too(model: Transformer) -> None:
    case = drawn(model)
    batch = batch_of(case, *EXTRAS)
    sigma, noise, guidance = ours.tensors(case, "sigma", "noise", "guidance")
    names = ("latents", "context", "latent_ids", "text_ids", "reference_ids", *EXTRAS)
    as_mapping = {name: getattr(batch, name) for name in names}
    one, _ = loss_and_gradients(model, batch, sigma, noise[:, :ROWS], guidance)
    other, _ = loss_and_gradients(model, as_mapping, sigma, noise[:, :ROWS], guidance)
    assert float(one) == float(other)


def test_a_mask_of_one_value_changes_nothing_and_masked_rows_have_no_say() -> None:
    prediction, latents, noise = mx.random.normal((3, 2, 4, 8), key=mx.random.key(0))
    plain = objective.loss(prediction, latents, noise, mx.ones(2))
    even = objective.loss(prediction, latents, noise, mx.ones(2), mx.full((2, 4), 0.3))
    assert float(even) == pytest.approx(float(plain), rel=1e-6)
    mask = mx.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    masked = objective.loss(prediction, latents, noise, mx.ones(2), mask)
    spoiled = mx.where(mask[..., None] > 0, prediction, 100)
    assert float(objective.loss(spoiled, latents, noise, mx.ones(2), mask)) == pytest.approx(float(masked), rel=1e-6)
    assert abs(float(masked) - float(plain)) > 1e-3


def test_references_stand_apart_in_time_and_begin_again_in_space() -> None:
    ids = np.array(reference_ids(((2, 2), (1, 3))))
    assert ids[:, 0].tolist() == [10] * 4 + [20] * 3
    assert ids[4:, 1:3].tolist() == [[0, 0], [0, 1], [0, 2]]
    np.testing.assert_array_equal(ids[:4, 1:], np.array(image_ids(2, 2))[:, 1:])


# From the store


def sample_of(
    name: str, size: tuple[int, int] = (4, 4), references: Sequence[str] = (), mask: str | None = None
) -> dict:
    latents = {"key": f"{name}-latents", "h": size[0], "w": size[1], "references": list(references), "mask": None}
    return {"id": name, "text": ["caption"], "latents": [latents], "repeats": 1, "prior": False}


def test_a_batch_shares_the_sizes_of_its_references_too() -> None:
    samples = []
    for n, sizes in enumerate([(), ((2, 2),), ((2, 2),), ((2, 3),), ((2, 2), (2, 2))] * 2):
        of = sample_of(f"s{n}", references=[f"r{n}-{k}" for k in range(len(sizes))])
        if sizes:
            of["latents"][0]["reference_sizes"] = [list(size) for size in sizes]
        samples.append(of)
    made = Batches({"samples": samples, "shared": {"empty": "e"}}, TrainOptions(batch=2), 0)
    passes = [draws for step in range(40) for draws in made.at(step)]
    assert all(len({drawn.item.bucket for drawn in draws}) == 1 for draws in passes)
    assert len({draws[0].item.bucket for draws in passes}) == 4
    assert {drawn.item.id for draws in passes for drawn in draws} == {of["id"] for of in samples}


class Shelf:
    """A store with one picture, its mask and two references; and another without any mask."""

    def __init__(self, path: Path) -> None:
        self.store = cache.open(path, "a")
        empty = self.put("text", "empty", np.zeros((4, 6), np.float32))
        self.body: dict[str, Any] = {"samples": [], "shared": {"empty": empty}}
        for name in ("a", "b"):
            of = sample_of(name, (2, 3))
            of["text"], (latents,) = [empty], of["latents"]
            latents["key"] = self.put("latents", name, self.noise(name, 2, 3))
            latents["references"] = [
                self.put("latents", f"{name}-{h}", self.noise(f"{name}-{h}", h, 2)) for h in (1, 2)
            ]
            latents["reference_sizes"] = [[1, 2], [2, 2]]
            self.body["samples"].append(of)
        self.mask = np.array([[0, 0.5, 1], [1, 1, 0]], np.float32)
        self.body["samples"][0]["latents"][0]["mask"] = self.put("masks", "a", self.mask)
        self.body["samples"][1]["prior"] = True

    @staticmethod
    def noise(name: str, height: int, width: int) -> np.ndarray:
        seed = int.from_bytes(name.encode(), "big")
        return np.random.default_rng(seed).standard_normal((height, width, 128), dtype=np.float32)

    def put(self, kind: str, name: str, array: np.ndarray) -> str:
        key = {"kind": kind, "dtype": "float32", "name": name, "max_length": 4}
        return self.store.publish(kind, key, array, {})

    def batch(self, prior_weight: float = 1.0) -> tuple[list[str], Batch]:
        made = Batches(self.body, TrainOptions(batch=2, prior_weight=prior_weight), 0)
        ((draws, batch),) = next(load_ahead(made, self.store, open_contexts(self.store, self.body, 6), 0, 1)).passes
        return [drawn.item.id for drawn in draws], batch


def test_references_masks_and_prior_weights_are_read_with_the_batch(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "store.zarr")
    names, batch = shelf.batch(prior_weight=0.25)
    assert set(names) == {"a", "b"}
    a, b = names.index("a"), names.index("b")
    assert batch.references is not None
    for row, name in ((a, "a"), (b, "b")):
        expected = np.concatenate([shelf.noise(f"{name}-{h}", h, 2).reshape(-1, 128) for h in (1, 2)])
        np.testing.assert_array_equal(np.array(batch.references[row]), expected)
    np.testing.assert_array_equal(np.array(batch.reference_ids), np.array(reference_ids(((1, 2), (2, 2)))))
    assert batch.mask is not None
    np.testing.assert_array_equal(np.array(batch.mask[a]), shelf.mask.reshape(-1))
    np.testing.assert_array_equal(np.array(batch.mask[b]), np.ones(6))  # without a mask all of it is trained
    assert batch.item_weight is not None
    assert (batch.item_weight[a].item(), batch.item_weight[b].item()) == (1.0, 0.25)
    assert shelf.batch()[1].item_weight is None


# Previews


def test_a_preview_is_drawn_from_its_references(model: Transformer) -> None:
    context = mx.random.normal((9, model.spec.context_width), key=mx.random.key(0))
    given = {"context": context, "negative": None, "height": 2, "width": 3, "seed": 1, "steps": 2, "guidance": 2.0}
    first = mx.random.normal((2, 2, 128), key=mx.random.key(1))
    plain = np.array(sample.draw(model, sample.Picture(**given)))
    one = np.array(sample.draw(model, sample.Picture(**given, references=(first,))))
    same = np.array(sample.draw(model, sample.Picture(**given, references=(first,))))
    moved = np.array(sample.draw(model, sample.Picture(**given, references=(first + 1,))))
    assert one.shape == plain.shape == (2, 3, 128)
    assert_near(one, same, 1e-6)
    assert min(np.abs(one - plain).max(), np.abs(one - moved).max()) > 1e-3
