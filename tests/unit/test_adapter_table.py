"""The tables of docs/adapters.md, made anew from what is read and written; WRITE_DOCS=1 puts them there."""

# pyright: reportAttributeAccessIssue=false

import os
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import namings
from tiny.namings import NAMINGS, OUTER, Naming, Outer

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.files import read_tensors
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_file, export
from flux2_relay.stages.train.adapter_formats import FORMATS, Format
from flux2_relay.stages.train.dora_update import DoraUpdate
from flux2_relay.stages.train.lokr_update import LokrUpdate
from flux2_relay.stages.train.updates import Factors, Update

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
AGAIN = "WRITE_DOCS=1 .venv/bin/python -m pytest tests/unit/test_adapter_table.py"
SPEC = TransformerSpec(
    double_blocks=1, single_blocks=1, heads=2, head_dim=4, context_width=12, guidance=True, rope_axes=(1, 1, 1, 1)
)
SCALE = 1.5


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(head: list[str], rows: list[str]) -> str:
    return "\n".join([row(*head), row(*["---"] * len(head)), *rows])


def blocks() -> namings.Pairs:
    return namings.pairs(SPEC, rank=4, outer=False)


def reads(naming: Naming, folder: Path) -> str:
    """Whether a file in this naming is understood: every update at its strength."""
    of, path = blocks(), folder / "read.safetensors"
    values, metadata = namings.file_of(naming, of, SCALE)
    mx.save_safetensors(str(path), values, metadata)
    try:
        found = adapter_file.read(path, SPEC)
    except InputError:
        return "refuses"
    near = [
        np.allclose(np.array(found[p].b @ found[p].a) * found[p].scale, SCALE * np.array(b @ a), rtol=1e-5, atol=1e-5)
        for p, (a, b) in of.items()
        if p in found
    ]
    return "yes" if len(near) == len(of) and all(near) else "wrong"


def writes(naming: Naming, folder: Path) -> str:
    """The formats whose files have just the names of this naming."""
    of, path = blocks(), folder / "written.safetensors"
    expected, _ = namings.file_of(naming, of, SCALE)
    made = []
    for form in FORMATS.values():
        export.write(path, {p: Factors(a, b, SCALE) for p, (a, b) in of.items()}, SPEC, form, {}, mx.float32)
        values, metadata = read_tensors(path)
        if values.keys() == expected.keys() and ("lora_adapter_metadata" in metadata) == (naming.alpha == "metadata"):
            made.append(f"`--format {form.name}`")
    return ", ".join(made)


def of_namings(folder: Path) -> str:
    alpha = {"folded": "folded", "tensor": "`….alpha`", "metadata": "metadata"}
    head = ["key of A", "alpha", "reads", "writes", "diffusers", "ComfyUI", "mflux"]
    rows = [
        row(f"`{n.module}.{n.factors[0]}`", alpha[n.alpha], reads(n, folder), writes(n, folder), n.diffusers)
        + f" {n.comfyui} | {n.mflux} |"
        for n in NAMINGS
    ]
    return table(head, rows)


def of_formats() -> str:
    head = ["`--format`", "A and B of a module", "q, k, v", "alpha", "header", "for"]
    return table(head, [of_format(form) for form in FORMATS.values()])


def of_format(form: Format) -> str:
    names = form.modules(SPEC)
    fused = any(len(module.parts) > 1 for module in names.values())
    first = next(name for name, module in names.items() if any(part.endswith(".to_q") for part in module.parts))
    return row(
        form.name,
        f"`{form.key(first)}.{form.factors[0]}`, `{form.factors[1]}`",
        "one matrix" if fused else "apart",
        "stored, float32" if form.stores_alpha else "folded into B",
        "`modelspec.…`, `ss_…`" if form.kohya_header else "`modelspec.…`",
        form.readers,
    )


KINDS: dict[str, Update] = {
    "LoRA": Factors(mx.ones((1, 8)), mx.ones((8, 1)), SCALE),
    "DoRA": DoraUpdate(Factors(mx.ones((1, 8)), mx.ones((8, 1)), SCALE), mx.ones(8), over_base=True),
    "LoKr": LokrUpdate(mx.ones((2, 2)), (mx.ones((4, 1)), mx.ones((1, 4))), SCALE),
}
BESIDE = {"LoRA": (), "DoRA": ("to_k", "to_v"), "LoKr": ()}  # a DoRA takes all parts of a matrix


def of_kinds(folder: Path) -> str:
    """The tensors of a module's update in each format, or that it is refused."""
    rows = [row(kind, *(written(kind, form, folder) for form in FORMATS.values())) for kind in KINDS]
    return table(["kind", *(f"`--format {name}`" for name in FORMATS)], rows)


def written(kind: str, form: Format, folder: Path) -> str:
    block = "transformer_blocks.0.attn."
    updates = {f"{block}{name}": KINDS[kind] for name in ("to_q", *BESIDE[kind])}
    try:
        export.write(folder / "k.safetensors", updates, SPEC, form, {}, mx.float32)
    except InputError:
        return "refused"
    keys = sorted(read_tensors(folder / "k.safetensors")[0], key=lambda key: (key.endswith("alpha"), key))
    return f"`{keys[0]}`" + "".join(f", `{_last(key)}`" for key in keys[1:])


def _last(key: str) -> str:
    head, _, last = key.rpartition(".")
    return f"{head.rpartition('.')[2]}.{last}" if last == "weight" else last


def becomes(outer: Outer, form: Format, folder: Path) -> str:
    """Refused, or what the readers do with it."""
    a, b = namings.pairs(SPEC)[outer.module]
    try:
        export.write(folder / "o.safetensors", {outer.module: Factors(a, b, SCALE)}, SPEC, form, {}, mx.float32)
    except InputError:
        return "refused"
    return f"diffusers {outer.diffusers[form.name]}, ComfyUI {outer.comfyui[form.name]}"


def of_outer(folder: Path) -> str:
    rows = [row(f"`{o.module}`", *(becomes(o, form, folder) for form in FORMATS.values())) for o in OUTER]
    return table(["module", *(f"`--format {name}`" for name in FORMATS)], rows)


def test_the_tables_are_up_to_date(tmp_path: Path) -> None:
    made = {"namings": of_namings(tmp_path), "formats": of_formats(), "outer": of_outer(tmp_path)}
    made["kinds"] = of_kinds(tmp_path)
    page = found = PAGE.read_text("utf-8")
    for name, text in made.items():
        between = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert between.search(page), f"{PAGE} has no place for the table {name}"
        page = between.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(page, "utf-8")
        return
    assert found == page, f"the tables of {PAGE} are out of date; make them anew: {AGAIN}"


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: f"{n.module}-{n.factors[0]}-{n.alpha}")
def test_every_row_is_read_and_the_formats_are_where_they_are_said_to_be(naming: Naming, tmp_path: Path) -> None:
    assert reads(naming, tmp_path) == "yes"
    assert writes(naming, tmp_path) == (f"`--format {naming.written}`" if naming.written else "")


def test_every_linear_outside_the_blocks_is_in_the_table() -> None:
    every = namings.shapes(SPEC).keys() - blocks().keys()
    assert {outer.module for outer in OUTER} == every
