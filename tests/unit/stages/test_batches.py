"""What each step trains on, and reading it ahead."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay import cache
from flux2_relay.cache.errors import InputError, StoreError
from flux2_relay.stages.train import batches as batches_module
from flux2_relay.stages.train.batches import Batches, Item, items, load_ahead
from flux2_relay.stages.train.contexts import Contexts, Stored, open_contexts, stored, tokens
from flux2_relay.stages.train.options import TrainOptions

EMPTY = "e"


def sample(name: str, size: tuple[int, int] = (4, 4), captions: int = 1, repeats: int = 1) -> dict:
    latents = [{"key": f"{name}-latents", "h": size[0], "w": size[1], "references": [], "mask": None}]
    texts = [f"{name}-{n}" for n in range(captions)]
    return {"id": name, "text": texts, "latents": latents, "repeats": repeats, "prior": False}


SQUARE = [sample(f"s{n}") for n in range(5)]
WIDE = [sample(f"w{n}", (2, 8)) for n in range(3)]


def batches(samples: list[dict], seed: int = 0, **options) -> Batches:
    body = {"samples": samples, "shared": {"empty": EMPTY}}
    return Batches(body, TrainOptions(**{"caption_dropout": 0.0, **options}), seed)


def ids(made: Batches, steps: range) -> list[list[str]]:
    """The items of each pass."""
    return [[drawn.item.id for drawn in draws] for step in steps for draws in made.at(step)]


def test_a_step_is_a_function_of_seed_and_step() -> None:
    made = batches(SQUARE + WIDE, batch=2, accumulate=2)
    forward = [made.at(step) for step in range(40)]
    assert [batches(SQUARE + WIDE, batch=2, accumulate=2).at(step) for step in reversed(range(40))] == forward[::-1]
    assert made.at(3) == forward[3]
    other = batches(SQUARE + WIDE, seed=1, batch=2, accumulate=2)
    assert ids(other, range(40)) != ids(made, range(40))


def test_every_item_comes_once_an_epoch() -> None:
    made = batches(SQUARE + WIDE)
    epochs = [[name for (name,) in ids(made, range(8 * n, 8 * n + 8))] for n in range(4)]
    assert all(sorted(epoch) == sorted(s["id"] for s in SQUARE + WIDE) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_last_batch_of_a_bucket_is_filled_from_its_beginning() -> None:
    made = batches(SQUARE + WIDE, batch=2)
    for epoch in range(4):
        passes = ids(made, range(5 * epoch, 5 * epoch + 5))  # three of squares, two of wide ones
        assert all(len(set(names)) == len(names) == 2 for names in passes)
        counts = Counter(name for names in passes for name in names)
        assert set(counts) == {s["id"] for s in SQUARE + WIDE}
        assert sorted(counts.values()) == [1] * 6 + [2] * 2


def test_a_bucket_smaller_than_the_batch_repeats() -> None:
    made = batches(WIDE[:1], batch=3)
    assert ids(made, range(2)) == [["w0"] * 3] * 2


def test_a_pass_is_of_one_bucket() -> None:
    made = batches(SQUARE + WIDE, batch=2, accumulate=3)
    passes = [draws for step in range(20) for draws in made.at(step)]
    assert all(len({drawn.item.size for drawn in draws}) == 1 for draws in passes)
    assert {draws[0].item.size for draws in passes} == {(4, 4), (2, 8)}


def test_accumulated_passes_go_on_through_the_epoch() -> None:
    one, three = batches(SQUARE + WIDE), batches(SQUARE + WIDE, accumulate=3)
    assert ids(three, range(5)) == ids(one, range(15))


def test_places_count_through_the_whole_step() -> None:
    made = batches(SQUARE, batch=2, accumulate=3)
    for step in range(4):
        assert [drawn.place for draws in made.at(step) for drawn in draws] == list(range(6))


def test_captions_are_dropped_at_the_rate_asked_for() -> None:
    def dropped(rate: float) -> int:
        made = batches(SQUARE, batch=2, caption_dropout=rate)
        captions = [drawn.caption for step in range(1000) for draws in made.at(step) for drawn in draws]
        return sum(caption == EMPTY for caption in captions)

    assert dropped(0.0) == 0
    assert dropped(1.0) == 2000
    assert abs(dropped(0.25) - 500) < 80  # four standard deviations


def test_dropout_changes_nothing_else() -> None:
    some, none = batches(SQUARE, batch=2, caption_dropout=0.5), batches(SQUARE, batch=2)
    for step in range(50):
        for a, b in zip(some.at(step)[0], none.at(step)[0], strict=True):
            assert a.item == b.item
            assert a.caption in (b.caption, EMPTY)


def test_all_captions_of_a_picture_are_used() -> None:
    made = batches([sample("s", captions=3)])
    counts = Counter(made.at(step)[0][0].caption for step in range(600))
    assert set(counts) == {"s-0", "s-1", "s-2"}
    assert all(abs(count - 200) < 50 for count in counts.values())


def test_repeats_count_within_an_epoch() -> None:
    made = batches([sample("often", repeats=3), sample("once")])
    counts = Counter(name for names in ids(made, range(4 * 5)) for name in names)
    assert counts == {"often": 15, "once": 5}


def test_a_picture_of_several_resolutions_is_an_item_in_each() -> None:
    both = sample("s")
    both["latents"] += sample("s", (8, 8))["latents"]
    found = list(items({"samples": [both]}))
    assert found == [Item("s", "s-latents", (4, 4), ("s-0",)), Item("s", "s-latents", (8, 8), ("s-0",))]


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(InputError, match="no pictures"):
        batches([])


# Reading


class Shelf:
    """A store of nine squares whose latents tell their number, and captions of two kinds."""

    def __init__(self, path: Path) -> None:
        self.store = cache.open(path, "a")
        self.keys: dict[str, str] = {}
        for name, rows in {"empty": 2, "prefix": 3, "pad": 1, "caption": 4}.items():
            values = np.arange(rows * 6, dtype=np.float32).reshape(rows, 6) + 100 * len(self.keys)
            self.keys[name] = self.put("text", name, values)
        samples = [sample(f"s{n}") for n in range(9)]
        for n, of in enumerate(samples):
            of["text"] = [self.keys["caption"]]
            of["latents"][0]["key"] = self.put("latents", str(n), np.full((4, 4, 128), n, np.float32))
        self.body = {"samples": samples, "shared": {name: self.keys[name] for name in ("empty", "prefix", "pad")}}

    def put(self, kind: str, name: str, array: np.ndarray) -> str:
        key = {"kind": kind, "dtype": "float32", "name": name, "max_length": 10}
        return self.store.publish(kind, key, array, {})

    def load(self, last: int, first: int = 0, **options) -> Iterator:
        made = Batches(self.body, TrainOptions(**{"caption_dropout": 0.0, **options}), 0)
        self.expected = [[[int(d.item.id[1:]) for d in draws] for draws in made.at(n)] for n in range(first, last)]
        return load_ahead(made, self.store, self.contexts(), first, last)

    def contexts(self) -> Contexts:
        return open_contexts(self.store, self.body, 6)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf") / "store.zarr")


def test_steps_come_in_order_with_what_they_asked_for(shelf: Shelf) -> None:
    loaded = list(shelf.load(12, batch=2, accumulate=2))
    assert [step.step for step in loaded] == list(range(12))
    found = [[batch.latents[:, 0, 0].astype(mx.int32).tolist() for _, batch in step.passes] for step in loaded]
    assert found == shelf.expected
    assert loaded[0].passes[0][1].latents.shape == (2, 16, 128)


def test_a_step_tells_how_long_it_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, real, slow = Shelf(tmp_path / "store.zarr"), cache.Store.read, threading.Event()

    def read(self: cache.Store, kind: str, key: str) -> cache.Entry:
        if kind == "latents" and not slow.is_set():
            slow.set()
            time.sleep(0.3)
        return real(self, kind, key)

    monkeypatch.setattr(cache.Store, "read", read)
    waits = []
    for loaded in shelf.load(4, batch=2):
        waits.append(loaded.wait_seconds)
        time.sleep(0.4 if len(waits) == 1 else 0)  # meanwhile the next is read
    assert waits[0] >= 0.2
    assert waits[1] < waits[0]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (3, 5), (4, 4)])
def test_short_stretches_are_read_too(shelf: Shelf, first: int, last: int) -> None:
    assert [step.step for step in shelf.load(last, first)] == list(range(first, last))


def test_contexts_are_whole_again(shelf: Shelf) -> None:
    (_, batch), *_ = next(shelf.load(1)).passes
    context = np.array(batch.context[0])
    rows = {name: shelf.store.read("text", key).array for name, key in shelf.keys.items()}
    expected = np.concatenate([np.repeat(rows["pad"], 10 - 3 - 4, axis=0), rows["prefix"], rows["caption"]])
    np.testing.assert_array_equal(context, expected)
    np.testing.assert_array_equal(np.array(batch.text_ids)[:, 3], np.arange(10))


def test_a_dropped_caption_is_the_empty_one(shelf: Shelf) -> None:
    (_, batch), *_ = next(shelf.load(1, caption_dropout=1.0)).passes
    np.testing.assert_array_equal(np.array(batch.context[0, -2:]), shelf.store.read("text", shelf.keys["empty"]).array)


@pytest.mark.parametrize("kind", ["text", "latents"])
def test_a_damaged_entry_stops_the_step_that_needs_it_and_is_named(tmp_path: Path, kind: str) -> None:
    shelf = Shelf(tmp_path / "store.zarr")
    key = shelf.keys["caption"] if kind == "text" else shelf.body["samples"][4]["latents"][0]["key"]
    (chunk,) = (shelf.store.path / kind / key).glob("c.*")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0xFF
    chunk.write_bytes(data)
    steps = shelf.load(9)
    good = 0 if kind == "text" else shelf.expected.index([[4]])
    for _ in range(good):
        next(steps)
    with pytest.raises(StoreError) as refused:
        next(steps)
    assert key in str(refused.value)
    assert "Run `relay cache verify --repair`, then `relay encode`." in str(refused.value)


def test_leaving_early_leaves_no_thread_behind(shelf: Shelf) -> None:
    import threading

    steps = shelf.load(9)
    next(steps)
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_the_readers_carry_entries_into_the_memory_of_mlx(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    names = []

    def noting(entry: cache.Entry) -> Stored:
        names.append(threading.current_thread().name)
        return stored(entry)

    monkeypatch.setattr(batches_module, "stored", noting)
    assert len(list(shelf.load(4, batch=2))) == 4
    assert len(names) == 4 * 2 * 2
    assert all(name.startswith("reader") for name in names)


def test_no_more_than_two_steps_are_read_ahead(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, step: asked.append(step) or real(self, step))
    for loaded in load_ahead(batches(shelf.body["samples"]), shelf.store, shelf.contexts(), 0, 6):
        assert max(asked) == min(loaded.step + 2, 5)


def test_finding_out_what_comes_next_counts_as_waiting(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, step: time.sleep(0.02) or real(self, step))
    waits = [loaded.wait_seconds for loaded in shelf.load(5)]
    assert min(waits[:3]) >= 0.02  # the last two have nothing to look for


def test_captions_of_another_width_are_refused(shelf: Shelf) -> None:
    with pytest.raises(InputError, match=r"have 6 channels, but .* reads 7"):
        open_contexts(shelf.store, shelf.body, 7)


def test_stored_types_come_back(tmp_path: Path) -> None:
    store = cache.open(tmp_path / "s.zarr", "a")
    values = mx.random.normal((2, 3, 128))
    for dtype in ("float32", "float16", "bfloat16"):
        typed = values.astype(getattr(mx, dtype))
        array = np.array(typed.view(mx.uint16) if dtype == "bfloat16" else typed)
        key = store.publish("latents", {"kind": "latents", "dtype": dtype}, array, {})
        assert mx.array_equal(tokens(stored(store.read("latents", key))), typed.reshape(6, 128).astype(mx.float32))
