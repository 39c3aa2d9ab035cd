"""Sets: what is named, what is missing, which is newest."""

import json

import numpy as np
import pytest

from flux2_relay import cache
from flux2_relay.cache.errors import InputError, StoreError
from flux2_relay.cache.keys import key_of
from flux2_relay.cache.sets import needs

K = [f"{i:064x}" for i in range(20)]
BODY = {
    "name": "fox",
    "request": {"taps": [1]},
    "identities": {"vae": K[19]},
    "shared": {"empty": K[0], "prefix": K[1], "pad": None},
    "samples": [
        {
            "id": "a",
            "text": [K[2], K[3]],
            "latents": [{"key": K[4], "h": 4, "w": 6, "references": [K[5], K[4]], "mask": K[6]}],
            "repeats": 1,
            "prior": False,
        },
        {
            "id": "b",
            "text": [K[2]],
            "latents": [{"key": K[7], "h": 4, "w": 4, "references": [], "mask": None}],
        },
    ],
    "prompts": [{"text": K[8], "negative": K[10], "references": [K[9]], "size": [64, 64], "seed": 1}],
}


@pytest.fixture
def store(tmp_path):
    return cache.open(tmp_path / "s", "a", wait=lambda seconds: None)


def test_needs_names_everything_once_in_order():
    assert needs(BODY) == {
        "text": [K[0], K[1], K[2], K[3], K[8], K[10]],
        "latents": [K[4], K[5], K[7], K[9]],
        "masks": [K[6]],
    }
    assert needs({}) == {"text": [], "latents": [], "masks": []}


def test_a_set_is_read_back_and_is_a_group_without_children(store):
    key = store.publish_set(BODY, {"at": "2025-01-01T00:00:00Z"})
    record = store.open_set(key[:8])
    assert (record.key, record.body, record.made) == (key, BODY, {"at": "2025-01-01T00:00:00Z"})
    assert (record.name, record.at) == ("fox", "2025-01-01T00:00:00Z")
    assert key == key_of(BODY)
    metadata = json.loads((store.path / "sets" / key / "zarr.json").read_bytes())
    assert metadata["node_type"] == "group"
    assert metadata["attributes"] == {**BODY, "made": record.made}
    assert [path.name for path in (store.path / "sets" / key).iterdir()] == ["zarr.json"]


def test_the_newest_set_is_the_one_asked_for_last(store):
    old, new = {"name": "old"}, {"name": "new"}
    store.publish_set(old, {"at": "2025-01-01T00:00:00Z"})
    store.publish_set(new, {"at": "2025-01-02T00:00:00Z"})
    assert [record.name for record in store.sets()] == ["new", "old"]
    store.publish_set(old, {"at": "2025-01-03T00:00:00Z"})
    assert [record.name for record in store.sets()] == ["old", "new"]
    assert [path.name for path in (store.path / "tmp").iterdir()] == ["zarr.json"]


def test_missing_shrinks_as_entries_come(store):
    entries = {i: {"kind": "text", "i": i} for i in range(3)}
    keys = [key_of(entry) for entry in entries.values()]
    body = {"name": "x", "samples": [{"text": keys, "latents": []}]}
    record = store.open_set(store.publish_set(body, {}))
    assert store.missing(record) == {"text": keys}
    store.publish("text", entries[1], np.zeros((1, 2), np.float32), {})
    assert store.missing(record) == {"text": [keys[0], keys[2]]}
    for entry in entries.values():
        store.publish("text", entry, np.zeros((1, 2), np.float32), {})
    assert store.missing(record) == {}


def test_only_the_patient_look_again(tmp_path):
    waits = []
    store = cache.open(tmp_path / "s", "a", wait=waits.append)
    record = store.open_set(store.publish_set(BODY, {}))
    assert store.missing(record, patient=False) == store.missing(record)
    assert waits == [1.0]


@pytest.mark.parametrize(
    ("body", "error"),
    [({"made": {}}, InputError), ({"cfg": 4.0}, TypeError), ({"name": "\udc80"}, InputError)],
)
def test_what_cannot_be_a_set_is_refused(store, body, error):
    with pytest.raises(error):
        store.publish_set(body, {})
    assert store.sets() == []


@pytest.mark.parametrize("indent", [None, 2])
def test_a_set_may_be_written_in_another_form(store, indent):
    """As another tool, or this program before it wrote sets as one line, would."""
    key = store.publish_set(BODY, {"at": "2025", "odd": '"name":"fox",'})
    path = store.path / "sets" / key / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=indent))
    assert store.open_set(key).body == BODY
    assert store.open_set(key).made == {"at": "2025", "odd": '"name":"fox",'}


@pytest.mark.parametrize("damage", ["edit", "truncate", "empty", "no file", "float", "array"])
def test_a_damaged_set_is_refused_by_name(store, damage):
    key = store.publish_set(BODY, {"at": "2025"})
    path = store.path / "sets" / key / "zarr.json"
    if damage == "no file":
        path.unlink()
    else:
        text = path.read_text()
        changed = {
            "edit": text.replace('"fox"', '"box"'),
            "truncate": text[:-20],
            "empty": "",
            "float": text.replace('"seed":1', '"seed":1.0'),
            "array": text.replace('"node_type":"group"', '"node_type":"array"'),
        }[damage]
        assert changed != text
        path.write_text(changed)
    for call in (store.sets, lambda: store.open_set(key)):
        with pytest.raises(StoreError, match=f"sets/{key} is damaged: .*relay cache verify --repair.*relay encode"):
            call()
    assert store.examine("sets", key) is not None
