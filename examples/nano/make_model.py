"""Make the nano model: a FLUX.2 of five million weights, trained from nothing on pictures of simple figures.

    python examples/nano/make_model.py --out examples/nano/model --report report

The VAE first, then transformer and text encoder together by rectified flow, then a shorter phase in which they learn to
give in one pass what classifier-free guidance gave in two (as FLUX.2-dev did), all on pictures drawn as they are
needed, a quarter of them in styles that a word in front asks for (`pictures.py`); last a check of what the base draws
(`judge.py`). Needs the extra `oracle`. README.md says on which machine the model here was made, and in what time.
"""

import argparse
import copy
import json
import random
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from flow import BUCKETS, Plan, draw, make_bucket, train_flow
from judge import Verdict, ink, judge
from parts import Parts, Sizes, build, write
from pictures import Packed, distances, flat, lay_out, pack
from PIL import Image
from scenes import STYLES, Scene, describe, draw_scene
from vae import SIDE, set_statistics, train_vae


def main() -> None:
    """Train, write the checkpoint, and report on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--report", type=Path, required=True, help="folder for figures and sample pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=int, default=200_000, help="size of the transformer's data set")
    parser.add_argument("--vae-steps", type=int, default=5_000)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--flow-steps", type=int, default=70_900)
    parser.add_argument("--flow-batch", type=int, default=256)
    parser.add_argument("--vae-limit", type=float, default=1e9, help="seconds after which training ends early")
    parser.add_argument("--flow-limit", type=float, default=1e9)
    parser.add_argument("--guided-steps", type=int, default=9_600)
    parser.add_argument("--guided-limit", type=float, default=1e9)
    parser.add_argument("--vae", type=Path, help="take this trained VAE")
    parser.add_argument("--judged", type=int, default=300, help="pictures that are drawn and checked")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    given.report.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    parts, figures = train(given)
    figures["seconds"] = time.perf_counter() - started
    write(copy.deepcopy(parts), given.out)
    if given.judged:
        figures |= check(parts, given.judged, given.report)
    print(json.dumps(figures), flush=True)
    (given.report / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def train(given: argparse.Namespace) -> tuple[Parts, dict[str, object]]:
    """The trained parts, their weights rounded to bfloat16, and what training reached."""
    started = time.perf_counter()
    parts = build(Sizes(), given.seed)
    for module in (parts.vae, parts.transformer, parts.text):
        torch.nn.Module.to(module, given.device)
    rng = random.Random(given.seed)
    scenes = [draw_scene(rng) for _ in range(given.pictures)]
    packed = pack(scenes).to(given.device)
    figures: dict[str, object] = {"seed": given.seed, "device": name_of(given.device), "torch": torch.__version__}
    if given.vae:
        parts.vae.load_state_dict(AutoencoderKLFlux2.from_pretrained(given.vae).state_dict())
    else:
        torch.backends.cudnn.benchmark = True
        figures |= train_vae(parts.vae, packed, given.vae_steps, given.vae_batch, given.vae_limit)
        torch.backends.cudnn.benchmark = False
        rounded(parts.vae)
        figures |= set_statistics(parts.vae, flat_pictures(packed[:1024]))
        parts.vae.save_pretrained(given.report / "vae")
    print(json.dumps(figures), flush=True)
    ends = np.cumsum([0, *(int(share * given.pictures) for share in BUCKETS.values())])
    buckets = [
        make_bucket(parts, scenes[first:last], size, given.device)
        for size, first, last in zip(BUCKETS, ends, ends[1:], strict=False)
    ]
    print(f"{time.perf_counter() - started:.0f} s: {[tuple(b.latents.shape) for b in buckets]}", flush=True)
    flow = Plan(
        name="flow", steps=given.flow_steps, batch=given.flow_batch, limit=given.flow_limit, guided=False, seed=2
    )
    figures |= train_flow(parts, buckets, flow)
    write(copy.deepcopy(parts), given.out)
    guided = replace(
        flow, name="guided", steps=given.guided_steps, limit=given.guided_limit, guided=True, seed=given.seed + 3
    )
    if guided.steps:
        figures |= train_flow(parts, buckets, guided)
    for module in (parts.transformer, parts.text):
        rounded(module)
    return parts, figures


def name_of(device: str) -> str:
    """What the machine calls its accelerator."""
    return torch.cuda.get_device_name() if device == "cuda" else device


@torch.no_grad()
def rounded(module: torch.nn.Module) -> None:
    """Round all weights to what will be stored."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())


def flat_pictures(packed: Packed) -> torch.Tensor:
    """Scenes in the base's style, [N, 3, H, W] in [-1, 1]."""
    generator = torch.Generator(packed.radius.device).manual_seed(7)
    return flat(packed, distances(packed, lay_out(packed, SIDE, SIDE, generator), SIDE, SIDE))


def check(parts: Parts, count: int, report: Path) -> dict[str, object]:
    """Shares of new captions that the base follows, and a sheet of the first pictures with their captions."""
    rng = random.Random(1234)
    scenes = [draw_scene(rng) for _ in range(count)]
    real = judged(as_images(flat_pictures(pack(scenes).to(parts.vae.device))), scenes)
    found: dict[str, object] = {f"real_{name}": share for name, share in real.items()}
    for guidance in (4.0, 1.0):
        drawn = torch.cat(
            [
                draw(parts, [describe(s) for s in scenes[n : n + 200]], (SIDE, SIDE), guidance=guidance, seed=n)
                for n in range(0, count, 200)
            ]
        )
        found |= {f"g{guidance:.0f}_{name}": share for name, share in judged(as_images(drawn), scenes).items()}
        save_sheet(as_images(drawn[:48]), report / f"base_g{guidance:.0f}.png")
    (report / "captions.txt").write_text("\n".join(map(describe, scenes[:48])) + "\n", encoding="utf-8")
    triggered = as_images(draw(parts, [f"sketchy {describe(s)}" for s in scenes[:200]], (SIDE, SIDE)))
    found |= {f"trigger_{name}": share for name, share in judged(triggered, scenes[:200]).items()}
    styled = [f"{word} {describe(scene)}" for scene, word in zip(scenes, list(STYLES) * count, strict=False)][:192]
    styled_images = as_images(draw(parts, styled, (SIDE, SIDE)))
    found |= {f"styled_{name}": share for name, share in judged(styled_images, scenes[: len(styled)]).items()}
    save_sheet(styled_images[:48], report / "styles.png")
    wide = as_images(draw(parts, [describe(s) for s in scenes[:200]], (96, 160)))
    found |= {f"wide_{name}": share for name, share in judged(wide, scenes[:200]).items()}
    save_sheet(as_images(draw(parts, [""] * 16, (SIDE, SIDE))), report / "base_empty.png")
    return found


def judged(images: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """Share of pictures for which each part of the verdict holds, and the mean of the style statistic."""
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    names = [field.name for field in fields(Verdict)] + ["follows"]
    shares = {name: float(np.mean([getattr(verdict, name) for verdict in verdicts])) for name in names}
    return shares | {"ink": float(np.mean([ink(image) for image in images]))}


def as_images(pictures: torch.Tensor) -> list[np.ndarray]:
    """Pictures [N, 3, H, W] in [-1, 1] -> uint8 [H, W, 3] each."""
    return list(((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def save_sheet(images: list[np.ndarray], path: Path, columns: int = 8) -> None:
    """Pictures side by side, row by row, in one file."""
    rows = [np.concatenate(images[n : n + columns], axis=1) for n in range(0, len(images), columns)]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


if __name__ == "__main__":
    main()
