"""`relay import`: values that several tools write alike, and what they are here."""

from collections.abc import Hashable, Mapping
from pathlib import Path

from flux2_relay.pipeline.import_rules import Carried, Convert, NotCarried, Tree

BUDGET = "memory.budget decides what stays in memory; `relay plan` says it"
PICTURES_ONLY = "pictures only"
KERNELS = "a matter of the other tool's kernels"
NO_SUCH = "there is no such loss or method here"
NO_UPLOAD = "nothing is uploaded by this program"
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "float32": "float32", "float": "float32"}
OPTIMIZERS: Mapping[object, object] = {
    **dict.fromkeys(("adamw", "adamw8bit", "adam8bit", "adam", "pagedadamw8bit", "pagedadamw"), "adamw"),
    **dict.fromkeys(("lion", "lion8bit"), "lion"),
    **dict.fromkeys(("adafactor",), "adafactor"),
    **dict.fromkeys(("prodigy", "prodigy8bit"), "prodigy"),
}
SCHEDULES: Mapping[object, object] = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "linear": "linear",
}


def choice(table: Mapping[object, object], otherwise: str = "there is nothing like it here") -> Convert:
    """One of a few words (any case) for another."""

    def convert(value: object, _: Tree) -> object:
        key = value.lower() if isinstance(value, str) else value
        if not isinstance(key, Hashable) or key not in table:
            raise NotCarried(otherwise)
        return table[key]

    return convert


def area(value: object, _: Tree) -> list[int]:
    """A resolution, [W, H] or a list of resolutions -> area budgets R in steps of 16."""
    sides = [side for side in (value if isinstance(value, list) else [value]) if isinstance(side, int | float)]
    if not sides or not all(16 <= side <= 1 << 16 for side in sides):
        raise NotCarried("this is no size in pixels")
    return list(dict.fromkeys(round(side / 16) * 16 for side in sides))


def rectangle(value: object, here: Tree) -> list[int]:
    """[W, H] of one bucket -> the side of a square with its area."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int | float) for side in value):
        return area((value[0] * value[1]) ** 0.5, here)
    return area(value, here)


def size(width: str, height: str, default: int = 512) -> Convert:
    """Width and height that stand side by side, as one size in steps of 16."""

    def convert(_: object, here: Tree) -> list[int]:
        sides = [here.get(width, default), here.get(height, default)]
        if not all(isinstance(side, int) and side >= 16 for side in sides):
            raise NotCarried("this is no size in pixels")
        return [round(int(str(side)) / 16) * 16 for side in sides]

    return convert


def pictures_in(folder: object) -> int:
    """How many pictures a data folder holds here; 0 where it is not here."""
    from flux2_relay.stages.encode.companions import is_image, walk

    place = Path(str(folder)).expanduser()
    try:
        return sum(map(is_image, walk(place))) if place.is_dir() else 0
    except OSError:
        return 0


def put_epochs(carried: Carried, key: str, epochs: object) -> None:
    """A length in epochs as one in steps, where the pictures can be counted."""
    values = {name: value for name, (value, _) in carried.values.items()}
    numbers = {name.split(".")[1] for name in values if name.startswith("data.")}
    counts = [pictures_in(values.get(f"data.{n}.path")) * int(str(values.get(f"data.{n}.repeats", 1))) for n in numbers]
    passes = int(str(values.get("train.batch", 1))) * int(str(values.get("train.accumulate", 1)))
    if not counts or not all(counts) or not isinstance(epochs, int):
        carried.leave(key, epochs, "set train.steps: epochs x pictures / batch, no pictures are there to be counted")
        return
    steps = max(1, epochs * sum(counts) // passes)
    carried.put("train.steps", steps, f"{carried.tool}: {key} {epochs} x {sum(counts)} pictures / {passes}")
