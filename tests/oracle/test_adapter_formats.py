"""Every naming and format in diffusers' hands: what the table in docs/adapters.md says of it is found out anew."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from oracle import adapters, reference_training
from oracle.reference import Reference
from tiny import namings
from tiny.namings import NAMINGS, OUTER, Naming, Outer

from flux2_relay.stages.train.adapter_formats import FORMATS
from flux2_relay.stages.train.export import write
from flux2_relay.stages.train.updates import Factors

LIMIT = 2e-5  # of the change of the output


def small(of: namings.Pairs) -> namings.Pairs:
    """The same with products about a tenth of a weight: neither lost in rounding nor the whole of the output."""
    return {path: (a, 0.1 * b / a.shape[1] ** 0.5 / a.shape[0] ** 0.5) for path, (a, b) in of.items()}


def updates(of: namings.Pairs, scales: dict[str, float]) -> dict[str, np.ndarray]:
    return {p: scales[p] * np.array(b).astype(np.float64) @ np.array(a).astype(np.float64) for p, (a, b) in of.items()}


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: f"{n.module}-{n.factors[0]}-{n.alpha}")
def test_what_diffusers_does_with_each_naming(reference: Reference, naming: Naming, tmp_path: Path) -> None:
    of = small(namings.pairs(adapters.spec_of(reference), rank=4, outer=False))
    values, metadata = namings.file_of(naming, of, 1.5)
    path = tmp_path / "adapter.safetensors"
    mx.save_safetensors(str(path), values, metadata)
    found = adapters.outcome(reference, path, updates(of, dict.fromkeys(of, 1.5)), LIMIT)
    assert found == naming.diffusers


def everything(spec) -> namings.Pairs:
    return namings.pairs(spec, rank=4, outer=False)


def mixed(spec) -> namings.Pairs:
    """Ranks that differ between modules, and between q, k and v."""
    ranks = {"to_q": 2, "to_k": 5, "to_v": 3, "add_q_proj": 1, "linear_in": 6}
    of = {rank: namings.pairs(spec, rank=rank, outer=False) for rank in (4, *ranks.values())}
    return {path: of[ranks.get(path.rpartition(".")[2], 4)][path] for path in of[4]}


def some(spec) -> namings.Pairs:
    """Some of q, k and v only."""
    parts = (".to_q", ".to_v", ".add_k_proj", "attn.to_out")
    return {path: pair for path, pair in everything(spec).items() if path.endswith(parts)}


def by_three(spec) -> namings.Pairs:
    return namings.pairs(spec, rank=6, outer=False)


def shared(spec) -> namings.Pairs:
    """One A for q, k and v, of a rank that three divides, as ai-toolkit trains them."""
    of = by_three(spec)
    firsts = {"to_k": "to_q", "to_v": "to_q", "add_k_proj": "add_q_proj", "add_v_proj": "add_q_proj"}
    return {path: (of[_sibling(path, firsts)][0], b) for path, (_, b) in of.items()}


def _sibling(path: str, firsts: dict[str, str]) -> str:
    block, _, name = path.rpartition(".")
    return f"{block}.{firsts.get(name, name)}"


ADAPTERS = (everything, mixed, some, by_three, shared)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("choose", ADAPTERS, ids=lambda choose: choose.__name__)
def test_each_export_does_what_the_merged_weights_do(reference: Reference, form: str, choose, tmp_path: Path) -> None:
    """Alpha is not the rank, in float32; both ways into diffusers where its names are used."""
    spec, path = adapters.spec_of(reference), tmp_path / "adapter.safetensors"
    of = small(choose(spec))
    scales = {name: 6 / a.shape[0] for name, (a, _) in of.items()}
    write(path, {n: Factors(a, b, scales[n]) for n, (a, b) in of.items()}, spec, FORMATS[form], {}, mx.float32)
    given, base = adapters.case(reference), reference.transformer
    before, expected = (
        reference_training.velocity(m, given) for m in (base, adapters.merged(reference, updates(of, scales)))
    )
    loads = [adapters.through_the_pipeline] + ([adapters.through_the_model] if form == "diffusers" else [])
    for load in loads:
        actual = reference_training.velocity(load(reference, path), given)
        assert adapters.error_of_change(actual, expected, before) <= LIMIT, load.__name__


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_in_bfloat16_is_as_near_as_its_rounding(reference: Reference, form: str, tmp_path: Path) -> None:
    spec, path = adapters.spec_of(reference), tmp_path / "adapter.safetensors"
    of = small(everything(spec))
    write(path, {n: Factors(a, b, 1.5) for n, (a, b) in of.items()}, spec, FORMATS[form], {}, mx.bfloat16)
    assert adapters.outcome(reference, path, updates(of, dict.fromkeys(of, 1.5)), 1e-2) == "ok"


@pytest.mark.parametrize("form", FORMATS)
def test_an_identity_changes_nothing(reference: Reference, form: str, tmp_path: Path) -> None:
    spec, path = adapters.spec_of(reference), tmp_path / "adapter.safetensors"
    of = {name: Factors(a, mx.zeros_like(b), 1.5) for name, (a, b) in everything(spec).items()}
    write(path, of, spec, FORMATS[form], {}, mx.float32)
    loaded, given = adapters.through_the_pipeline(reference, path), adapters.case(reference)
    assert loaded.peft_config, "nothing was loaded"
    expected = reference_training.velocity(reference.transformer, given)
    np.testing.assert_allclose(reference_training.velocity(loaded, given), expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("outer", OUTER, ids=lambda outer: outer.module)
@pytest.mark.parametrize("form", FORMATS)
def test_what_becomes_of_a_module_outside_the_blocks(
    reference: Reference, outer: Outer, form: str, tmp_path: Path
) -> None:
    """Beside one block's module, so that something is loaded; a format that refuses a module is not asked for it."""
    spec = adapters.spec_of(reference)
    every = small(namings.pairs(spec, rank=4))
    if outer.module not in every:
        pytest.skip("a Klein takes no guidance")
    of = {outer.module: every[outer.module]}
    beside = "single_transformer_blocks.0.attn.to_out"
    naming = next(n for n in NAMINGS if n.written == form)
    values, _ = namings.file_of(naming, of | {beside: every[beside]}, 1.5)
    path = tmp_path / "adapter.safetensors"
    mx.save_safetensors(str(path), values)
    both = updates(of | {beside: every[beside]}, {outer.module: 1.5, beside: 1.5})
    found = adapters.outcome(reference, path, both, 5e-4)  # a weak module alone changes little
    expected = outer.diffusers[form]
    assert found == ("ok" if expected == "ok" else "wrong")
