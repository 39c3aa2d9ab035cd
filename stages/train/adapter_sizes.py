"""The sizes of the transformer that an adapter is for, from the shapes of its factors.

A file can so be converted, and faults in it be named, on a machine that has no model. Every side of every linear is
a small multiple of the width, or one of a few other sizes: on a probe whose sizes are unlike primes, a side says which.
"""

import re
from collections import Counter
from collections.abc import Iterable

from flux2_relay.stages.catalogue import CATALOGUE
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_names

Side = tuple[str, str, int]
"""Plain name of a module, factor (A or B), and the columns of A or the rows of B."""

_PROBE = TransformerSpec(
    double_blocks=1,
    single_blocks=1,
    heads=1,
    head_dim=11,
    context_width=13,
    guidance=True,
    channels=17,
    mlp_ratio=7.0,
    time_channels=5,
)
_D, _M = _PROBE.hidden, _PROBE.mlp_width
_MULTIPLES = {_D: 1, 2 * _D: 2, 3 * _D: 3, 6 * _D: 6}
_BLOCK = re.compile(r"(double|single|transformer|single_transformer)_blocks_(\d+)_(.+)")


def spec_of(sides: Iterable[Side]) -> TransformerSpec | None:
    """The transformer with these sides, that of the catalogue where it has one of this width; None if none shows."""
    sides = list(sides)
    told = _told(sides)
    widths = Counter(size // _MULTIPLES[side] for side, size in told if side in _MULTIPLES)
    if not widths or not (width := widths.most_common(1)[0][0]):
        return None
    mlps = Counter(mlp for side, size in told if (mlp := _mlp_width(side, size, width)) > 0)
    mlp = mlps.most_common(1)[0][0] if mlps else 3 * width
    for spec, _ in CATALOGUE.values():
        if (spec.hidden, spec.mlp_width) == (width, mlp):
            return spec
    others = {side: size for side, size in reversed(told)}
    return TransformerSpec(
        double_blocks=_blocks(sides, ("double", "transformer")),
        single_blocks=_blocks(sides, ("single", "single_transformer")),
        heads=1,
        head_dim=width,
        context_width=others.get(_PROBE.context_width, 3 * width),
        guidance=any("guidance" in name for name, _, _ in sides),
        channels=others.get(_PROBE.channels, 128),
        mlp_ratio=(mlp + 0.5) / width,  # int(width * ratio) is exactly mlp again
        time_channels=others.get(_PROBE.time_channels, 256),
    )


def family_of(spec: TransformerSpec) -> str | None:
    """What other programs call the released model of these sizes: dev, klein-4b or klein-9b; a base is its twin."""
    return next((name.replace("-base", "") for name, (known, _) in CATALOGUE.items() if known == spec), None)


def _told(sides: list[Side]) -> list[tuple[int, int]]:
    """(side of the probe, size here) for every side of a module that FLUX.2 has."""
    known, told = adapter_names.known(_PROBE), []
    for name, factor, size in sides:
        module = known.get(re.sub(r"_blocks_\d+_", "_blocks_0_", name, count=1))
        if module is not None:
            told.append((module.shape[factor == "A"], size))
    return told


def _mlp_width(side: int, size: int, width: int) -> int:
    """M, where a side tells it: 2M, M, D + M, or 3D + 2M."""
    known = {_M: size, 2 * _M: size // 2, _D + _M: size - width, 3 * _D + 2 * _M: (size - 3 * width) // 2}
    return known.get(side, 0)


def _blocks(sides: list[Side], kinds: tuple[str, ...]) -> int:
    found = (_BLOCK.fullmatch(name) for name, _, _ in sides)
    return 1 + max((int(block[2]) for block in found if block is not None and block[1] in kinds), default=-1)
