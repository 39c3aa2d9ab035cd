"""Hidden states in a file between the layers: the same numbers, a batch of them in memory, nothing left behind."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import model
from tiny.compare import assert_near
from tiny.project import Project

from flux2_relay import cache
from flux2_relay.cache.errors import RelayError
from flux2_relay.stages import spec
from flux2_relay.stages.encode import layout, spill
from flux2_relay.stages.encode.encoder_weights import open_encoder
from flux2_relay.stages.encode.layout import TextLayout, text_layout
from flux2_relay.stages.encode.options import EncodeOptions
from flux2_relay.stages.encode.text import TextEncoder, load_text_encoder

CAPTIONS = [f"a red fox number {n} " + "and a blue dog " * (n % 4) for n in range(12)]


def load(folder: Path, bits: int = 32) -> TextEncoder:
    return load_text_encoder(folder, spec.read_text_spec(folder / "text_encoder"), bits, streamed=True)


def encoded(encoder: TextEncoder, captions: Sequence[str], pass_tokens: int = 10_000) -> dict[str, np.ndarray]:
    """Every caption's rows, taken as the stage takes them."""
    found = {}
    for done in encoder.passes(captions, pass_tokens, 40):
        found |= {captions[index]: np.array(rows.astype(mx.float32)) for index, rows in done.rows}
    return found


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("pass_tokens", [1, 100, 10_000])
def test_numbers_are_the_same_bit_for_bit(checkpoint: Path, tmp_path: Path, bits: int, pass_tokens: int) -> None:
    encoder = load(checkpoint, bits)
    expected = encoded(encoder, CAPTIONS, pass_tokens)
    found = encoded(replace(encoder, spill=tmp_path / "spill"), CAPTIONS, pass_tokens)
    assert found.keys() == expected.keys()
    for caption, rows in expected.items():
        np.testing.assert_array_equal(found[caption], rows)
    assert list((tmp_path / "spill").iterdir()) == []


def test_only_a_batch_is_in_memory(dev: Path, tmp_path: Path) -> None:
    """Without the file all rows of a pass would be."""
    many = [f"{caption} {n}" for n in range(40) for caption in CAPTIONS]
    encoder = load(dev)
    of_all = 4 * encoder.spec.hidden * (1 + len(encoder.spec.taps)) * sum(map(encoder.cost, many))
    peaks = []
    for place in (None, tmp_path):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for done in replace(encoder, spill=place).passes(many, 10**6, 64):
            for _, rows in done.rows:
                mx.eval(rows)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > 0.9 * of_all
    assert peaks[1] < of_all / 4, "two layers and a batch"


def test_the_file_has_no_name(tmp_path: Path) -> None:
    """So it is gone whatever becomes of the process."""
    with spill.Spill(tmp_path) as file:
        os.pwrite(file._file.fileno(), b"x" * 100, 0)
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill.os, "pwrite", full)
    with pytest.raises(RelayError, match=r"hidden states cannot be written there \(No space left on device\)"):
        encoded(replace(load(dev), spill=tmp_path), CAPTIONS)


def planned(dev: Path, budget: int, tokens: int, room: int = 10**9) -> TextLayout:
    text = spec.read_text_spec(dev / "text_encoder")
    options = EncodeOptions(bits=32, stream="always", batch_tokens=32)
    return text_layout(text, options, budget, open_encoder(dev / "text_encoder", text), tokens, room)


def test_a_file_is_used_where_it_saves_more_than_it_costs(dev: Path) -> None:
    """A row of the tiny model has 256 bytes, with its three taps a kilobyte; memory holds some fifty of them."""
    tensors = open_encoder(dev / "text_encoder", spec.read_text_spec(dev / "text_encoder"))
    layer = sum(info.end - info.start for name, info in tensors.info.items() if name.startswith("layers.0."))
    least = 464_000
    of = planned(dev, least, 10_000)
    assert of.spilled
    assert of.pass_tokens == 4 * layer // 512
    assert of.file_bytes(10_000) == of.pass_tokens * 1024
    assert of.peak_bytes(10_000, 0) <= least, "the captions' own copies of the prefix aside"
    assert not planned(dev, least, 48).spilled, "memory holds them all"
    assert not planned(dev, 10 * least, 10_000).spilled, "memory holds enough of them"
    assert not planned(dev, least, 10_000, room=0).spilled, "no room"
    assert planned(dev, least, 10_000, room=500 * 1024).pass_tokens == 500


def test_a_pass_that_is_smaller_than_a_batch_stays_within_the_budget(dev: Path) -> None:
    of = planned(dev, 464_000, 10_000, room=0)
    assert not of.spilled
    assert of.peak_bytes(10_000, 0) <= 464_000


def test_the_stage_and_the_plan_choose_it(dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_WORTH", 0.1)  # the tiny model's layers are small, its rows are not
    data = model.write_pictures(tmp_path / "data", 20)
    encode = {"bits": 32, "stream": "always", "batch_tokens": 16}
    projects = []
    for name, room in (("memory", 0), ("file", 10**9)):
        monkeypatch.setattr(spill, "room_bytes", lambda room=room: room)
        project = Project(tmp_path / name, dev, data).write({"encode": encode, "memory": {"budget": 440_000}})
        said = project.relay("plan").said
        assert ("hidden states in a file of" in " ".join(said.split())) == (room > 0)
        outcome = project.relay("encode")
        assert ("tokens a pass in a file of" in outcome.said) == (room > 0), outcome.said
        projects.append(cache.open(project.store))
    assert projects[0].keys("text") == projects[1].keys("text") != set()
    for key in projects[0].keys("text"):
        found, expected = (store.read("text", key).array for store in projects)
        assert_near(found, expected, 1e-5)  # other captions run together: rounding
