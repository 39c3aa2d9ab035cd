"""What adapter files call the linears of a FLUX.2 transformer: diffusers' names, BFL's, and where mflux differs.

BFL's files hold q, k and v as one matrix and the two halves of `norm_out` in the other order; everything else is a
renaming (`stages/names.py` has the tables).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flux2_relay.stages import names
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.transformer import DOUBLE, SINGLE, block_linears, outer_shapes

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_")


@dataclass(frozen=True, slots=True)
class Module:
    """A linear as a layout names it: one of ours, or three whose rows it stacks; shape [out, in]."""

    parts: tuple[str, ...]
    shape: tuple[int, int]
    swapped: bool = False  # the two halves of its rows stand in the other order


Modules = Mapping[str, Module]
"""The name of a linear in a layout -> which of ours it is."""


def diffusers(spec: TransformerSpec) -> Modules:
    """Every linear under its name in diffusers, those outside the blocks included."""
    shapes: dict[str, tuple[int, int]] = block_linears(spec) | {n: (s[0], s[1]) for n, s in outer_shapes(spec).items()}
    return {name: Module((name,), shape) for name, shape in shapes.items()}


def bfl(spec: TransformerSpec) -> Modules:
    """Every linear under its name in BFL's files."""
    ours = diffusers(spec)
    found = {theirs: ours[path] for theirs, path in names.OUTER.items() if path in ours}
    for theirs, path in names.SWAPPED.items():
        found[theirs] = Module((path,), ours[path].shape, swapped=True)
    for index in range(spec.double_blocks):
        block, bare = f"{DOUBLE}.{index}", f"double_blocks.{index}"
        for theirs, parts in names.FUSED.items():
            rows, columns = ours[f"{block}.{parts[0]}"].shape
            found[f"{bare}.{theirs}"] = Module(tuple(f"{block}.{part}" for part in parts), (3 * rows, columns))
        found |= _renamed(ours, block, bare, names.DOUBLE)
    for index in range(spec.single_blocks):
        found |= _renamed(ours, f"{SINGLE}.{index}", f"single_blocks.{index}", names.SINGLE)
    return found


def _renamed(ours: Modules, block: str, bare: str, table: Mapping[str, str]) -> dict[str, Module]:
    """One block's linears that are only renamed; norms, which the table has as well, get no adapter."""
    pairs = {f"{bare}.{theirs}": f"{block}.{path}" for theirs, path in table.items()}
    return {theirs: ours[path] for theirs, path in pairs.items() if path in ours}


def mflux(spec: TransformerSpec) -> Modules:
    """The linears that mflux alone calls otherwise: it drops a `.0` and a level of the time embedding."""
    ours = diffusers(spec)
    blocks = [f"{DOUBLE}.{index}.attn.to_out" for index in range(spec.double_blocks)]
    time = "time_guidance_embed"
    return {name: ours[f"{name}.0"] for name in blocks} | {
        f"{time}.linear_{n}": ours[f"{time}.timestep_embedder.linear_{n}"] for n in (1, 2)
    }


def known(spec: TransformerSpec) -> Modules:
    """Every linear under the plain form of every name that it has anywhere."""
    layouts = (diffusers(spec), bfl(spec), mflux(spec))
    return {plain(name): module for layout in layouts for name, module in layout.items()}


def plain(name: str) -> str:
    """A module's name without what programs put in front, its dots as underscores: the one form that all can take."""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name.replace(".", "_")
