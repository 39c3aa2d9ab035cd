"""Write the golden fixtures: two tiny checkpoints, and what diffusers, transformers, peft and torch make of them.

    python tests/golden/make.py            # writes them anew (needs the extra `oracle`)
    python tests/golden/make.py --check    # makes them aside and compares: weights bit by bit, results to rounding

`make test` reads the files without torch. Every result is computed in float32 from the bfloat16 weights as stored.
"""

import argparse
import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from oracle import checkpoints, reference_training  # noqa: E402
from oracle.checkpoints import Sizes  # noqa: E402
from oracle.reference import Reference, quiet  # noqa: E402
from tiny import cases, compare  # noqa: E402
from tiny.captions import CAPTIONS  # noqa: E402
from tiny.golden import HERE, Golden, pack_context  # noqa: E402

RECORDED = ("diffusers", "transformers", "torch", "peft", "tokenizers", "numpy")
TEXT = {"vocab_size": 512, "hidden_size": 32}
SIZES = {
    # The real taps and text length.
    "dev": Sizes(
        text={**TEXT, "intermediate_size": 36, "num_hidden_layers": 31}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
        transformer={"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": True},
        vae={"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
        dtype=torch.bfloat16,
    ),
    # Taps and length of its own, uneven rotary axes, a decoder narrower than the encoder.
    "klein": Sizes(
        text={**TEXT, "intermediate_size": 48, "num_hidden_layers": 5}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 20},
        transformer={"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"axes_dims_rope": (2, 6, 4, 4), "guidance_embeds": False},
        vae={"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4}
        | {"decoder_block_out_channels": (8, 8, 12, 12)},
        dtype=torch.bfloat16,
        text_config={"flux2_taps": [1, 2, 4], "flux2_text_length": 64},
    ),
}
MAKERS = {"dev": checkpoints.dev_like, "klein": checkpoints.klein_like}
CAPTION_NAMES = ("plain", "empty", "unicode", "special", "newlines", "nested_image", "long")
PICTURES = {"square": (32, 32), "wide": (16, 48), "tall": (64, 16)}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.02}
STEPS = 8
RANK, ALPHA = 2, 3.0


def main() -> int:
    """Write or check; 1 where a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files that are there, write nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory() as aside:
        for name in SIZES:
            make(Path(aside), name)
        if check:
            return report(Path(aside))
        for name in SIZES:
            shutil.rmtree(HERE / name, ignore_errors=True)
            shutil.move(Path(aside) / name, HERE / name)
            shutil.move(Path(aside) / f"{name}.safetensors", HERE / f"{name}.safetensors")
    return 0


def make(folder: Path, name: str) -> None:
    """`folder/NAME/`, the checkpoint, and `folder/NAME.safetensors`, inputs and results."""
    reference = Reference(MAKERS[name](folder / name, 1, SIZES[name]))
    arrays = {**texts(reference), **pictures(reference), **velocities(reference), **training(reference)}
    metadata = {"adamw": json.dumps(ADAMW), "alpha": str(ALPHA), "rank": str(RANK)}
    metadata |= {f"version_{library}": version(library) for library in RECORDED}
    # safetensors writes the memory of a transposed array as it lies, without a word.
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    save_file(arrays, folder / f"{name}.safetensors", metadata)


def texts(reference: Reference) -> dict[str, np.ndarray]:
    """`context/CAPTION`: the rows of each caption, equal rows in front kept once."""
    contexts = reference.context([CAPTIONS[name] for name in CAPTION_NAMES])
    return {f"context/{name}": pack_context(rows) for name, rows in zip(CAPTION_NAMES, contexts, strict=True)}


def pictures(reference: Reference) -> dict[str, np.ndarray]:
    """`picture/SIZE/`: pixels, their latents, and the pixels of those."""
    arrays = {}
    for name, (height, width) in PICTURES.items():
        images = cases.picture(height, width, seed=1)
        latents = reference.latents(images)
        found = {"images": images, "latents": latents, "decoded": reference.images(latents)}
        arrays |= {f"picture/{name}/{key}": value for key, value in found.items()}
    return arrays


def velocities(reference: Reference) -> dict[str, np.ndarray]:
    """`velocity/CASE/`: inputs and the velocity."""
    config, arrays = reference.transformer.config, {}
    drawn = {
        "plain": cases.draw(config.joint_attention_dim, seed=2, text=20, grids=((3, 2),)),
        "references": cases.draw(config.joint_attention_dim, seed=3, text=12, grids=((2, 3), (2, 2), (1, 3))),
    }
    if config.guidance_embeds:
        drawn["guided"] = cases.draw(config.joint_attention_dim, seed=4, text=20, grids=((2, 4),), guidance=(1.0, 3.5))
    for name, case in drawn.items():
        expected = reference_training.velocity(reference.transformer, case)
        arrays |= cases.flat(case, f"velocity/{name}/") | {f"velocity/{name}/expected": expected}
    return arrays


def training(reference: Reference) -> dict[str, np.ndarray]:
    """`training/`: one item, an adapter with its loss and gradients, and a few updates from a fresh one."""
    model, config = reference.transformer, reference.transformer.config
    guidance = (2.5,) if config.guidance_embeds else None
    case = cases.draw(config.joint_attention_dim, seed=5, text=12, grids=((2, 4),), sigma=(0.6,), guidance=guidance)
    linears = reference_training.block_linears(model)
    values = cases.adapter(shapes(model, linears), seed=6)
    with reference_training.adapted(model, linears, values, ALPHA) as factors:
        loss, gradients = reference_training.gradients(model, case, factors)
    start = {name: value * (".lora_A." in name) for name, value in values.items()}
    random = np.random.default_rng(7)
    sigmas = random.uniform(0.05, 0.95, (STEPS, 1)).astype(np.float32)
    noises = random.standard_normal((STEPS, *case.noise.shape), dtype=np.float32)
    steps = cases.steps(case, sigmas, noises)
    with reference_training.adapted(model, linears, start, ALPHA) as factors:
        losses, trained = reference_training.train(model, steps, factors, ADAMW)
    arrays = cases.flat(case, "training/")
    arrays |= {"training/loss": np.float32([loss]), "training/losses": np.float32(losses)}
    arrays |= {"training/sigmas": sigmas, "training/noises": noises}
    for part, found in (("adapter", values), ("gradient", gradients), ("trained", trained)):
        arrays |= {f"training/{part}/{name}": value for name, value in found.items()}
    return arrays


def shapes(model: torch.nn.Module, linears: list[str]) -> dict[str, tuple[int, int]]:
    """Names and shapes of an adapter on these linears."""
    found = {}
    for name in linears:
        rows, columns = model.get_submodule(name).weight.shape
        found |= {f"{name}.lora_A.weight": (RANK, columns), f"{name}.lora_B.weight": (rows, RANK)}
    return found


def report(made: Path) -> int:
    """Print every difference between the files made and those that are there; 0 if there is none that counts."""
    faults = []
    for name in SIZES:
        old, new = Golden(name, HERE), Golden(name, made)
        faults += [f"{name}: {fault}" for fault in checkpoint_faults(old.folder, new.folder)]
        if set(old.arrays) != set(new.arrays):
            faults.append(f"{name}: other results: {sorted(set(old.arrays) ^ set(new.arrays))}")
            continue
        errors = {key: compare.relative_error(new.arrays[key], old.arrays[key]) for key in old.arrays}
        faults += [f"{name}: {key} differs by {error:.1e}" for key, error in errors.items() if error > limit(key)]
        print(f"{name}: {len(errors)} arrays, largest difference {max(errors.values()):.1e}")
        for library in RECORDED:
            was, now = (golden.metadata[f"version_{library}"] for golden in (old, new))
            print(f"  {library} {was}" + ("" if was == now else f", now {now}"))
    print("\n".join(faults))
    return bool(faults)


def limit(key: str) -> float:
    """How far a result may be from the recorded one: rounding on another machine, a tenth of what a test allows."""
    if key.startswith("context/"):
        return compare.CONTEXT / 10
    return compare.TRAINED / 10 if key.startswith("training/trained/") else compare.GRADIENT / 10


def checkpoint_faults(old: Path, new: Path) -> list[str]:
    """Files and tensors that are not the same; the version that wrote a config does not count."""
    names = {folder: {str(path.relative_to(folder)) for path in folder.rglob("*.*")} for folder in (old, new)}
    faults = [f"{name} is on one side only" for name in sorted(names[old] ^ names[new])]
    for name in sorted(names[old] & names[new]):
        if contents(old / name) != contents(new / name):
            faults.append(f"{name} differs")
    return faults


def contents(path: Path) -> object:
    """What two equal files have in common."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            # float64 holds bfloat16, float32 and the counters exactly.
            return {key: file.get_tensor(key).double().numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    if path.suffix != ".json":
        return path.read_bytes()
    ignored = ("transformers_version", "_diffusers_version")
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ignored}


if __name__ == "__main__":
    sys.exit(main())
