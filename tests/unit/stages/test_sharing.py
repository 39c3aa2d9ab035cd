"""Several processes, one store: shards that leave nothing out, orders that meet seldom."""

from pathlib import Path

import pytest
from tiny.project import Project

from flux2_relay import cache
from flux2_relay.cache.errors import InputError
from flux2_relay.cache.keys import key_of
from flux2_relay.stages.encode import sharing

KEYS = [key_of({"i": i}) for i in range(2000)]


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_key_falls_to_one_shard_and_shards_are_alike(count: int) -> None:
    shards = [sharing.Shard(number, count).of({"text": KEYS, "masks": []}) for number in range(1, count + 1)]
    assert sorted(key for of in shards for key in of["text"]) == sorted(KEYS)
    sizes = [len(of["text"]) for of in shards]
    mean = len(KEYS) / count
    assert all(abs(size - mean) <= 5 * mean**0.5 for size in sizes)
    assert all(set(of) == {"text"} for of in shards)


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1 / 4"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="I/N"):
        sharing.shard(text)


def test_a_shard_is_read_as_it_is_written() -> None:
    assert sharing.shard("3/64") == sharing.Shard(3, 64)
    assert sharing.shard("1/1") == sharing.WHOLE


def test_each_process_has_an_order_of_its_own() -> None:
    wants = {key: place for place, key in enumerate(KEYS)}
    first, second = sharing.own_order(wants), sharing.own_order(wants)
    assert first == second == wants  # as mappings
    assert list(first) != list(second)
    followers = sum(b == a + 1 for a, b in zip(first.values(), list(first.values())[1:], strict=False))
    assert followers < 20  # entries that stand beside each other in the data set are far apart; one is expected


def test_shards_fill_a_store_between_them(dev: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, pictures).write()
    seen: set[tuple[str, str]] = set()
    for number in (3, 1, 2):
        outcome = project.relay("encode", "--shard", f"{number}/3")
        assert outcome.status == 0, outcome.said
        store = cache.open(project.store)
        now = {(kind, key) for kind in ("text", "latents") for key in store.keys(kind)}
        assert all(sharing.Shard(number, 3).holds(key) for _, key in now - seen)
        seen = now
        (record,) = store.sets()
        left = sum(map(len, store.missing(record, patient=False).values()))
        assert (f"lacks {left} entries of other shards" in outcome.said) == (left > 0)
    assert not left
    assert "is complete" in outcome.said
    assert "encoded 0 captions and 0 images" in project.relay("encode").said


def test_a_wrong_shard_is_refused_before_the_data_is_read(dev: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "p", dev, tmp_path / "no-pictures").write()
    outcome = project.relay("encode", "--shard", "0/3")
    assert outcome.status == 2
    assert "--shard 0/3" in outcome.said
