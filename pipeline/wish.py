"""What `relay sample` was asked for, as far as the command line tells it; what it leaves open the config decides."""

import math
from dataclasses import dataclass
from pathlib import Path

from flux2_relay.cache.errors import InputError

_STEP = 16  # pixels of one token


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Every prompt at every seed and scale, into `folder`; None leaves it to the config's `previews`."""

    folder: Path
    prompts: tuple[str, ...]
    negative: str | None = None
    seeds: tuple[int, ...] = ()
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None  # width, height in pixels
    references: tuple[Path, ...] = ()
    adapters: tuple[tuple[Path, float], ...] = ()  # each with its scale
    scales: tuple[float, ...] = ()  # each multiplies those of all adapters

    def guidance_or(self, configured: float) -> float:
        """The guidance, where it is not given that of the config."""
        return configured if self.guidance is None else self.guidance

    def size_or(self, configured: tuple[int, int]) -> tuple[int, int]:
        """The size, where it is not given that of the config."""
        return self.size or configured

    def check(self, takes_guidance: bool, distilled: bool, guidance: float) -> None:
        """Refuse what makes no sense, all of it at once, for a model that takes guidance as an input or is distilled.

        `guidance` is what will be used.
        """
        faults = []
        if not self.prompts:
            faults.append("--prompt: nothing to draw; give at least one prompt")
        if self.folder.exists() and not self.folder.is_dir():
            faults.append(f"-o {self.folder}: is a file; name a folder")
        if self.scales and not self.adapters:
            faults.append("--scale: there is no adapter to be scaled; name one with --adapter")
        if self.guidance is not None and distilled and not takes_guidance:
            faults.append("--guidance: this model is distilled and takes none; leave it out")
        if self.negative is not None and (distilled or takes_guidance):
            faults.append("--negative: this model is distilled and reads no negative prompt; leave it out")
        elif self.negative is not None and guidance <= 1:
            faults.append(f"--negative: has no say at a guidance of {guidance:g}; give --guidance above 1")
        if faults:
            raise InputError("\n".join(faults))


def parse_size(text: str) -> tuple[int, int]:
    """`768x512` -> width and height in pixels."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"--size {text}: write width and height in pixels as WxH, for example 768x512")
    width, height = (int(part) for part in parts)
    if any(side < _STEP or side % _STEP for side in (width, height)):
        nearest = "x".join(str(max(_STEP, round(side / _STEP) * _STEP)) for side in (width, height))
        raise InputError(f"--size {text}: both sides must be multiples of {_STEP}; the nearest is {nearest}")
    return width, height


def parse_adapter(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE=SCALE`; a file whose own name has that form is taken as it is."""
    front, equals, behind = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():
        return Path(text), 1.0
    try:
        scale = float(behind)
    except ValueError:
        raise InputError(f"--adapter {text}: {behind!r} is no number; write it as FILE or FILE=SCALE") from None
    if not math.isfinite(scale):
        raise InputError(f"--adapter {text}: the scale must be a finite number")
    return Path(front), scale


def parse_scale(text: str) -> float:
    """A finite number."""
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"--scale {text}: the scale must be a finite number, such as 0.8")
    return scale
