"""What ranks must have in common: otherwise they would train something that nobody asked for, or wait for ever."""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version

import mlx.core as mx
import numpy as np

from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.job import Job
from flux2_relay.stages.train.layout import Layout
from flux2_relay.stages.train.ranks import Group
from flux2_relay.stages.train.resume import digest_of_data
from flux2_relay.stages.train.transformer import Transformer


def check(job: Job, spec: TransformerSpec, layout: Layout) -> None:
    """Compare this rank's set, model and options with the first rank's; InputError names what differs.

    Reads no weights.
    """
    options = {"lora": asdict(job.lora), "train": asdict(job.train)}
    job.group.check(
        {
            "the release of this program": version("flux2-relay"),
            "the set (pictures, captions, or how they were encoded)": digest_of_data(job.record.body),
            "the model's shape": repr(spec),
            "the width of the model's weights (memory.bits)": layout.stored or f"{layout.bits} bit",
            "what the sections lora and train say": json.dumps(options, sort_keys=True, default=str),
            "run.seed": str(job.seed),
            "validation.fraction": str(job.validation.fraction),
            "save.every": str(job.save.every),
            "--max-steps": str(job.max_steps),
        }
    )


def check_weights(group: Group, transformer: Transformer) -> None:
    """Compare the weights outside the blocks, which any other training of the model moved, too; InputError likewise."""
    if group.is_alone:
        return
    digest = hashlib.sha256()
    for name, weight in sorted(transformer.outer.items()):
        digest.update(name.encode())
        for part in weight if isinstance(weight, tuple) else (weight,):
            digest.update(np.array(part.reshape(-1).view(mx.uint8)).tobytes())
    group.check({"the model's weights": digest.hexdigest()})
