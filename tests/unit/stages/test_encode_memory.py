"""What stage one takes of memory, as the operating system counts it: a few layers, never the encoder.

Here on layers of 21 MB; `make torture` runs it on 12 of 86 MB (HIDDEN=1024), which together are a gigabyte.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest
from tiny import model
from tiny.project import Project

from flux2_relay.stages.encode import encoder_weights
from flux2_relay.stages.spec import read_text_spec

HIDDEN = int(os.environ.get("HIDDEN", "512"))
MB = 10**6
ROWS = 100_000  # of the embedding: more bytes than may be taken, so that it cannot have been loaded
BUFFERS = 50 * MB  # of a BLAS and the store's writer
CODE = """
import json, sys
sys.modules["torch"] = None  # as where this program alone is installed: transformers would bring it along
from flux2_relay.pipeline import cli
from flux2_relay.stages import measure, vae
from flux2_relay.stages.encode import text

told, load_text, load_vae = {}, text.load_text_encoder, vae.load_encoder

def captions(*arguments, **named):
    told["before"] = measure.resident_bytes()
    return load_text(*arguments, **named)

def pictures(*arguments, **named):
    told["after"], told["peak"] = measure.resident_bytes(), measure.peak_resident_bytes()
    return load_vae(*arguments, **named)

text.load_text_encoder, vae.load_encoder = captions, pictures
cli.main(["encode", "-c", sys.argv[1]])
print(json.dumps(told))
"""


@pytest.fixture
def large(dev: Path, tmp_path: Path) -> Iterator[Path]:
    """A dev-like checkpoint with twelve layers of honest size; of its transformer stage one reads the config alone."""
    folder = Path(shutil.copytree(dev, tmp_path / "large", ignore=lambda *_: ["text_encoder", "transformer"]))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 6 * HIDDEN, "num_hidden_layers": 13, "head_dim": 64}
    heads = {"num_attention_heads": HIDDEN // 64, "num_key_value_heads": HIDDEN // 256, "vocab_size": ROWS}
    text = {"model_type": "mistral", **model.TEXT, **sizes, **heads, "rope_theta": 1e6}
    for part, config in (
        ("text_encoder", {"text_config": text, **model.OWN, "flux2_taps": [4, 8, 12]}),
        ("transformer", {**model.TRANSFORMER, "joint_attention_dim": 3 * HIDDEN, "guidance_embeds": True}),
    ):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    write(folder / "text_encoder")
    yield folder
    shutil.rmtree(folder)  # pytest would keep a gigabyte of it


def write(folder: Path) -> None:
    """Every layer has the same random values; the embedding is a hole in the file but for the tiny vocabulary."""
    shapes = encoder_weights.tensor_shapes(read_text_spec(folder))
    table, *names = sorted(shapes, key=lambda name: name.startswith("layers."))
    header, at = {}, 0
    for name in (*names, table):
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [at, at := at + 4 * prod(shapes[name])]}
    text = json.dumps(header).encode()
    noise = (np.random.default_rng(0).standard_normal(6 * HIDDEN * HIDDEN, dtype=np.float32)) / HIDDEN**0.5
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(memoryview(noise[: prod(shapes[name])] if len(shapes[name]) == 2 else noise[:1] * 0 + 1))
        file.write(noise[: model.VOCABULARY * HIDDEN])
        file.truncate(8 + len(text) + at)


def test_a_streamed_encoder_takes_two_layers_and_gives_them_back(large: Path, pictures: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", large, pictures).write({"encode": {"bits": 32, "stream": "always"}})
    done = subprocess.run(
        [sys.executable, "-c", CODE, project.config], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "streamed" in done.stderr + done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    text = read_text_spec(large / "text_encoder")
    layer, rows = encoder_weights.layer_bytes(text, 32), 4 * HIDDEN * model.VOCABULARY
    hidden_states = 10 * text.length * 4 * HIDDEN * (1 + len(text.taps))
    allowed = int(2.5 * layer) + rows + hidden_states
    assert told["peak"] <= allowed + 300 * MB, "all of the process, its libraries counted"
    assert told["peak"] - told["before"] <= allowed + BUFFERS < 6 * layer
    assert told["after"] - told["before"] <= BUFFERS, "given back before the VAE is loaded"
