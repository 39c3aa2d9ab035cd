"""Blocks that are read each time they are needed: in which order, and how far ahead."""

import threading
from collections.abc import Iterator

import mlx.core as mx
import pytest

from flux2_relay.stages.train.residence import BlockWeights, Streamed, resident_places

BLOCKS = 5
A_STEP = [*range(BLOCKS), *reversed(range(BLOCKS))]


class Shelf:
    """Notes which blocks are read, and holds readers up while it is shut."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Semaphore(0)

    def __call__(self, place: int) -> BlockWeights:
        self.begun.release()
        assert self.open.wait(30)
        self.read.append(place)
        return {"place": mx.array(place)}


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    found = Shelf()
    yield found
    found.open.set()


def walk(streamed: Streamed, order: list[int]) -> list[int]:
    streamed.announce(order)
    found = [streamed.weights(place)["place"] for place in order]
    return [place.item() for place in found if isinstance(place, mx.array)]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("ahead", [1, 2, 9])
@pytest.mark.parametrize("resident", [0, 2])
def test_every_block_is_what_was_asked_for_and_the_one_at_a_turn_is_read_once(
    shelf: Shelf, ahead: int, resident: int
) -> None:
    streamed = Streamed(BLOCKS, shelf, resident, ahead)
    held = resident_places(BLOCKS, resident)
    assert shelf.read == held
    for _ in range(3):
        assert walk(streamed, A_STEP) == A_STEP
    streamed.close()
    way = [place for place in A_STEP * 3 if place not in held]
    turns = [place for place, before in zip(way, [None, *way], strict=False) if place != before]
    assert sorted(shelf.read[resident:]) == sorted(turns)
    assert ahead > 1 or shelf.read[resident:] == turns


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_next_blocks_are_read_while_one_is_used(shelf: Shelf, ahead: int) -> None:
    streamed = Streamed(BLOCKS, shelf, 0, ahead)
    streamed.announce(range(BLOCKS))
    streamed.weights(0)
    shelf.open.clear()
    for _ in range(1 + ahead):
        assert shelf.begun.acquire(timeout=30)
    assert not shelf.begun.acquire(timeout=0.05), "no more than `ahead` are on their way"
    shelf.open.set()
    streamed.close()


def test_what_was_not_announced_is_read_all_the_same(shelf: Shelf) -> None:
    streamed = Streamed(BLOCKS, shelf)
    streamed.announce([0, 1, 2])
    for place in (3, 1, 4):
        found = streamed.weights(place)["place"]
        assert isinstance(found, mx.array)
        assert found.item() == place
    streamed.close()


def test_a_failing_read_is_raised_where_the_block_is_asked_for() -> None:
    def broken(place: int) -> BlockWeights:
        if place == 1:
            raise OSError("gone")
        return {}

    streamed = Streamed(BLOCKS, broken)
    streamed.announce(range(BLOCKS))
    streamed.weights(0)
    with pytest.raises(OSError, match="gone"):
        streamed.weights(1)
    streamed.close()


@pytest.mark.parametrize(
    ("blocks", "resident", "places"),
    [(4, 0, []), (4, 2, [1, 3]), (8, 2, [3, 7]), (5, 3, [1, 3, 4]), (3, 3, [0, 1, 2])],
)
def test_resident_blocks_stand_evenly_between_streamed_ones(blocks: int, resident: int, places: list[int]) -> None:
    assert resident_places(blocks, resident) == places
