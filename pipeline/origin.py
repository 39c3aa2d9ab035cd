"""What a run was made from, kept in its folder when it begins, so that its report needs neither model nor store.

RUN/origin.json    model, set, versions, plan, and a look at the data: every bucket, some of the pictures
RUN/thumbnails/    small copies of those, each cut as it was encoded; only of files that are here and unchanged

Training needs no pictures: where they are elsewhere there is no copy, and `relay report` takes it later where it can.
"""

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux2_relay.cache.errors import RelayError
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.run_folder import RunFolder

if TYPE_CHECKING:
    from flux2_relay.cache import Store
    from flux2_relay.stages.encode.images import Placement
    from flux2_relay.stages.folders import ModelFolders
    from flux2_relay.stages.spec import TransformerSpec
    from flux2_relay.stages.train.job import Job
    from flux2_relay.stages.train.layout import Layout

MOST_SHOWN = 48
"""Pictures of the data set that a report shows; all are counted."""
_MOST_CAPTIONS, _LONGEST_CAPTION = 4, 2000
_THUMBNAIL = 192  # pixels of the longer side
_STEP = 16  # pixels behind one latent position


def keep(
    run: RunFolder, config: Config, job: "Job", places: "ModelFolders", spec: "TransformerSpec", layout: "Layout"
) -> None:
    """Write origin.json and take thumbnails; a run does not depend on it, so what fails is only said."""
    try:
        told = _origin(job, places, spec, layout)
        aside = run.path / "origin.part"
        aside.write_text(json.dumps(told, indent=1, ensure_ascii=False), "utf-8")
        os.replace(aside, run.path / "origin.json")
        take_thumbnails(run, config)
    except (OSError, RelayError) as error:
        run.say(f"the report will not say all that this run was made from ({error}); training goes on")


def read(run: RunFolder) -> dict[str, Any]:
    """What `keep` wrote; nothing where it is missing or damaged."""
    try:
        told = json.loads((run.path / "origin.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def thumbnail_of(run: RunFolder, latents: Mapping[str, Any]) -> Path:
    """Where the small copy of a picture lies, if there is one."""
    return run.path / "thumbnails" / f"{str(latents['key'])[:16]}.jpg"


def take_thumbnails(run: RunFolder, config: Config) -> int:
    """Copy pictures that are here, that are the ones that were encoded, and that were not copied yet -> how many."""
    taken, told = 0, read(run)
    with suppress(KeyError, TypeError, ValueError, AttributeError):  # a damaged origin.json: the page says so
        folders = [*told["set"]["made"].get("paths", []), *(options.path for options in config.data)]
        for sample in told["data"]["shown"]:
            latents = sample["latents"][0] if sample["latents"] else None
            if latents is not None and not (target := thumbnail_of(run, latents)).exists():
                taken += _take(_places(sample["id"], folders, len(config.data)), latents, target)
    return taken


def _origin(job: "Job", places: "ModelFolders", spec: "TransformerSpec", layout: "Layout") -> dict[str, Any]:
    import mlx.core as mx

    from flux2_relay.stages import blas
    from flux2_relay.stages.spec import name_of

    record = job.record
    return {
        "model": {
            "name": name_of(places),
            "path": str(places.root),
            "distilled": job.distilled,
            "transformer": asdict(spec),
        },
        "set": {"key": record.key, "identities": record.body["identities"], "made": dict(record.made)},
        "versions": {"flux2-relay": version("flux2-relay"), "mlx": version("mlx"), "python": platform.python_version()},
        "machine": {"system": platform.platform(), "device": str(mx.default_device()), "products": blas.describe()},
        "plan": {"peak_bytes": layout.peak_bytes, "in_words": layout.in_words()},
        "data": data_of(job.store, record.body, job.validation.fraction),
    }


def data_of(store: "Store", body: Mapping[str, Any], fraction: float) -> dict[str, Any]:
    """All buckets counted, and some samples in full, evenly spread."""
    from flux2_relay.stages.train import validation

    samples = body["samples"]
    held = {sample["id"] for sample in validation.split(body, fraction)[1]["samples"]}
    buckets = Counter((of["w"] * _STEP, of["h"] * _STEP) for sample in samples for of in sample["latents"])
    step = max(1, math.ceil(len(samples) / MOST_SHOWN))
    return {
        "pictures": len(samples),
        "captions": sum(len(sample["text"]) for sample in samples),
        "held_out": len(held),
        "prior": sum(bool(sample["prior"]) for sample in samples),
        "buckets": [[width, height, count] for (width, height), count in sorted(buckets.items())],
        "shown": [_shown(store, sample, sample["id"] in held) for sample in samples[::step]],
    }


def _shown(store: "Store", sample: Mapping[str, Any], held_out: bool) -> dict[str, Any]:
    keys = sample["text"][:_MOST_CAPTIONS]
    captions = [store.header("text", key).attributes["key"]["caption"] for key in keys]
    return {
        "id": sample["id"],
        "captions": [str(caption)[:_LONGEST_CAPTION] for caption in captions],
        "all_captions": len(sample["text"]),
        "repeats": sample["repeats"],
        "prior": sample["prior"],
        "held_out": held_out,
        "latents": [dict(_latents(store, of)) for of in sample["latents"]],
    }


def _latents(store: "Store", listed: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    made_of = store.header("latents", listed["key"]).attributes["key"]
    yield "key", listed["key"]
    yield "size", [listed["w"] * _STEP, listed["h"] * _STEP]
    yield "references", len(listed["references"])
    yield "mask", listed["mask"] is not None
    yield from ((name, made_of[name]) for name in ("source", "resize", "crop", "flip", "background"))


def _places(name: str, folders: Sequence[str], count: int) -> Iterator[Path]:
    """Where a sample's picture may lie: below each place where the data was when it was encoded, or should be now."""
    number, _, rest = name.partition("/")
    for place, folder in enumerate(folders):
        root = Path(folder).expanduser()
        root = root.parent if root.suffix.lower() in (".jsonl", ".csv") else root
        if count == 1:
            yield root / name
        elif number == str(place % count):
            yield root / rest


def _take(places: Iterator[Path], latents: Mapping[str, Any], target: Path) -> bool:
    """One small copy, if the file is found and has the bytes that were encoded."""
    from flux2_relay.stages import identity
    from flux2_relay.stages.encode import images

    for path in places:
        try:
            if path.is_file() and identity.file_sha256(path) == latents["source"]:
                width, height = latents["resize"][:2]
                x, y, w, h = latents["crop"]
                cut = images.Placement(resize=(width, height), crop=(x, y, w, h), flip=bool(latents["flip"]))
                _save(path, cut, latents["background"] or "#ffffff", target)
                return True
        except (OSError, RelayError):
            continue  # a picture is no reason to stop: the page says how many are missing
    return False


def _save(path: Path, placement: "Placement", background: str, target: Path) -> None:
    from PIL import Image

    from flux2_relay.stages.encode import images

    pixels = images.read_pixels(path, placement, background)
    picture = Image.fromarray(((pixels + 1) * 127.5).round().astype("uint8"))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    target.parent.mkdir(exist_ok=True)
    aside = target.with_suffix(f".{os.getpid()}")
    picture.save(aside, "JPEG", quality=88)
    os.replace(aside, target)
