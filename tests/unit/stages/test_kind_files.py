"""Files of DoRA and LoKr: written, read back, drawn with, merged, started from; refused where a format has no place."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import cases, comfyui, ours
from tiny.compare import assert_near, relative_error

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages import names
from flux2_relay.stages.files import read_tensors
from flux2_relay.stages.train import adapter_file, adapter_proof, export, init, lora, merge, mixing, visits
from flux2_relay.stages.train.adapter_formats import FORMATS
from flux2_relay.stages.train.dora_update import OVER_BASE, DoraUpdate
from flux2_relay.stages.train.lokr_update import LokrUpdate
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import Transformer, block_linears, from_tensors
from flux2_relay.stages.train.updates import Factors, Update
from flux2_relay.stages.weights import open_tensors

KINDS = {
    "dora": LoraOptions(kind="dora", rank=3, alpha=4.5),
    "lokr": LoraOptions(kind="lokr", rank=2, alpha=3.0, factor=4),
    "lokr whole": LoraOptions(kind="lokr", rank=500, factor="auto"),
}
Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def model(dev: Path) -> Transformer:
    return ours.load(dev)


def trained(model: Transformer, options: LoraOptions) -> dict[str, Update]:
    """Updates of which nothing is zero, attached; about a tenth of a weight."""
    start = ours.attach(model, options)
    values = cases.adapter({name: value.shape for name, value in start.items()}, seed=1)
    for name, value in start.items():
        if "magnitude" in name:
            values[name] = value * (1 + 0.1 * np.sin(100 * values[name]))
        if "lokr_w1" in name:
            values[name] = 0.2 * values[name]
    lora.load(model, {name: mx.array(value) for name, value in values.items()})
    return export.updates_of(model)


def weights(model: Transformer) -> dict[str, np.ndarray]:
    return {p: np.array(w) for p, w in visits.linears(model, block_linears(model.spec)) if isinstance(w, mx.array)}


def changed(model: Transformer, updates: dict[str, Update], strength: float = 1.0) -> dict[str, np.ndarray]:
    """The weights with all updates, by the updates' own rows, in stretches that do not divide the matrix."""
    found = {}
    for path, weight in weights(model).items():
        rows = [mx.array(weight[first : first + 7]) for first in range(0, len(weight), 7)]
        changes = [updates[path].change(part, 7 * n) for n, part in enumerate(rows)]
        found[path] = weight + strength * np.concatenate([np.array(change) for change in changes])
    return found


def write(model: Transformer, path: Path, updates: dict[str, Update], form: str, dtype: mx.Dtype = mx.float32) -> None:
    def base(module: str):
        ((_, weight),) = visits.linears(model, [module])
        return visits.stretches(weight, weight.shape[1])  # pyright: ignore[reportAttributeAccessIssue]

    ready = export.suited(updates, FORMATS[form], base)
    export.write(path, ready, model.spec, FORMATS[form], {}, dtype)


def velocity(model: Transformer) -> np.ndarray:
    return ours.velocity(model, cases.draw(model.spec.context_width, seed=4, guidance=(3.0, 1.0)))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_makes_of_a_file_what_was_trained(
    model: Transformer, tmp_path: Path, kind: str, strength: float
) -> None:
    updates, path = trained(model, KINDS[kind]), tmp_path / "a.safetensors"
    write(model, path, updates, "comfyui")
    expected, base = changed(model, updates, strength), weights(model)
    for module, weight in comfyui.loaded(path, base, strength).items():
        assert relative_error(weight - base[module], expected[module] - base[module]) < 1e-5, module


def test_what_merges_is_what_is_drawn_with(model: Transformer, dev: Path, tmp_path: Path) -> None:
    """Three kinds on the same modules, each at a strength; and each alone."""
    base = names.open_transformer(dev / "transformer")
    all_updates = [trained(model, KINDS["dora"]), trained(model, KINDS["lokr"]), trained(model, LoraOptions(rank=2))]
    model.adapters = {}
    before = velocity(model)
    for number, strengths in enumerate([(1.0, 0.0, 0.0), (0.5, -0.7, 0.4), (0.0, 1.0, 0.0), (0.3, 0.0, 0.0)]):
        shards = merge.plan(model.spec, "F32")
        (folder := tmp_path / str(number)).mkdir()
        merge.merge(base, mixing.changes_of(all_updates, strengths), shards, folder, lambda written: None)
        expected = velocity(from_tensors(open_tensors(folder), model.spec, bits=32))
        model.adapters = mixing.mix([mixing.measured(of, model) for of in all_updates], strengths)
        assert relative_error(before, expected) > 1e-2
        assert_near(velocity(model), expected, 1e-5)
    assert mixing.size(all_updates) == sum(x.nbytes for of in all_updates for u in of.values() for x in u.arrays())


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_as_it_was_written(model: Transformer, tmp_path: Path, kind: str, form: str) -> None:
    updates, path = trained(model, KINDS[kind]), tmp_path / "a.safetensors"
    if KINDS[kind].kind in FORMATS[form].kinds:
        with pytest.raises(InputError, match=rf"--format {form} cannot carry .*\n  transformer_blocks\.0\.attn\.to_q"):
            write(model, path, updates, form)
        assert not path.exists()
        return
    write(model, path, updates, form)
    found = adapter_file.read_file(path)
    assert (found.spec.hidden, found.spec.mlp_width) == (model.spec.hidden, model.spec.mlp_width)
    measured = mixing.measured(found.factors, model)
    assert adapter_proof.largest(updates, measured).error < 1e-6
    assert found.metadata["flux2_relay.kind"] == KINDS[kind].kind
    assert (OVER_BASE.items() <= found.metadata.items()) == (kind == "dora")


def test_a_finished_run_leaves_what_its_readers_take(model: Transformer, tmp_path: Path) -> None:
    for kind, part in (("dora", "dora_scale"), ("lokr", "lokr_w2_a")):
        updates = trained(model, KINDS[kind])
        export.write_finished(model, tmp_path / f"{kind}.safetensors", {})
        values, _ = read_tensors(tmp_path / f"{kind}.safetensors")
        assert any(name.endswith(part) for name in values)
        again = mixing.measured(adapter_file.read(tmp_path / f"{kind}.safetensors", model.spec), model)
        assert adapter_proof.largest(updates, again).error < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_cost_what_they_may_and_lengths_keep_theirs(model: Transformer, tmp_path: Path, kind: str) -> None:
    write(model, tmp_path / "a.safetensors", trained(model, KINDS[kind]), "comfyui", mx.bfloat16)
    values, _ = read_tensors(tmp_path / "a.safetensors")
    exact = {name for name, value in values.items() if value.dtype == mx.float32}
    assert exact == {name for name in values if name.endswith(("dora_scale", "alpha"))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_does_what_its_file_does(model: Transformer, tmp_path: Path, kind: str) -> None:
    options, path = KINDS[kind], tmp_path / "a.safetensors"
    updates = trained(model, options)
    expected = velocity(model)
    write(model, path, updates, "comfyui")
    wider = LoraOptions(kind=options.kind, rank=options.rank + 1, alpha=9.0, factor=options.factor, init=str(path))
    lora.attach(model, wider, seed=3)
    assert relative_error(velocity(model), expected) > 1e-2
    init.start(model, wider)
    assert_near(velocity(model), expected, 1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "lora", "rank": 8}, "is of the kind lokr there and lora here (lora.kind)"),
        ({"kind": "lokr", "rank": 2, "factor": 8}, "is 4 x 4 times 144 x 16 there and 8 x 8 times 72 x 8 here"),
        ({"kind": "lokr", "rank": 1, "factor": 4}, "has rank 2 there and 1 here"),
    ],
)
def test_a_start_that_would_lose_something_is_refused(model: Transformer, tmp_path: Path, options, said: str) -> None:
    write(model, tmp_path / "a.safetensors", trained(model, KINDS["lokr"]), "comfyui")
    with pytest.raises(InputError) as refused:
        init.read(LoraOptions(**options, init=str(tmp_path / "a.safetensors")), model.spec)
    assert f"to_qkv_mlp_proj {said}" in str(refused.value)


def test_names_of_peft_are_read(model: Transformer, tmp_path: Path) -> None:
    for kind in ("dora", "lokr"):
        updates = trained(model, KINDS[kind])
        values = {f"base_model.model.{name}": value for name, value in lora.parameters(model).items()}
        metadata = lora.metadata(model, KINDS[kind])
        assert ('"transformer.use_dora": true' in metadata["lora_adapter_metadata"]) == (kind == "dora")
        mx.save_safetensors(str(tmp_path / "a.safetensors"), values, metadata)
        assert adapter_proof.largest(updates, adapter_file.read(tmp_path / "a.safetensors", model.spec)).error < 1e-6


def test_a_product_over_q_k_and_v_is_cut_where_its_blocks_of_rows_allow_it(tmp_path: Path, model: Transformer) -> None:
    w1, w2 = mx.random.normal((6, 4)), mx.random.normal((32, 16))
    key = "diffusion_model.double_blocks.1.txt_attn.qkv"
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2})
    found = adapter_file.read(tmp_path / "a.safetensors", model.spec)
    rows = np.concatenate([np.array(update.change(mx.zeros((64, 64)), 0)) for update in found.values()])
    assert list(found) == [f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
    np.testing.assert_allclose(rows, np.kron(np.array(w1), np.array(w2)), rtol=1e-6)


def test_both_factors_of_kronecker_may_have_a_rank(tmp_path: Path, model: Transformer) -> None:
    """Alpha is over the rank of W2; over that of W1 where W2 is whole."""
    a, b, c, d = (mx.random.normal(shape) for shape in ((4, 1), (1, 4), (16, 2), (2, 16)))
    for w2, rank in (({"lokr_w2_a": c, "lokr_w2_b": d}, 2), ({"lokr_w2": c @ d}, 1)):
        named = {"lokr_w1_a": a, "lokr_w1_b": b, **w2, "alpha": mx.array(3.0)}
        values = {f"lycoris_{Q.replace('.', '_')}.{name}": value for name, value in named.items()}
        mx.save_safetensors(str(tmp_path / "a.safetensors"), values)
        update = adapter_file.read(tmp_path / "a.safetensors", model.spec)[Q]
        expected = 3.0 / rank * np.kron(np.array(a @ b), np.array(c @ d))
        np.testing.assert_allclose(np.array(update.change(mx.zeros((64, 64)), 0)), expected, rtol=1e-4, atol=1e-5)


def lokr_of(p: int, q: int, k: int, n: int) -> LokrUpdate:
    return LokrUpdate(mx.random.normal((p, q)), (mx.random.normal((k, n)),), 1.0)


def test_what_the_formats_have_no_place_for_is_refused_by_name(model: Transformer, tmp_path: Path) -> None:
    dora = trained(model, KINDS["dora"])
    low = Factors(mx.ones((1, 64)), mx.ones((64, 1)), 1.0)
    k, to_out = Q.replace("to_q", "to_k"), Q.replace("to_q", "to_out.0")
    refused = [
        ({Q: dora[Q], k: low}, "comfyui", f"{Q}: is one matrix with 2 others there, and not all of them have DoRA"),
        ({Q: lokr_of(4, 4, 16, 16), k: low}, "diffusers", f"{k}: no other kind can stand in a file with LoKr"),
        (
            {"norm_out.linear": lokr_of(4, 4, 32, 16)},
            "diffusers",
            "norm_out.linear: LoKr of modules outside the blocks",
        ),
        ({Q: lokr_of(4, 4, 16, 16), k: lokr_of(2, 8, 32, 8)}, "comfyui", f"{Q} and others: the sides of their factors"),
        ({Q: lokr_of(4, 4, 16, 16)}, "kohya", f"{Q}: under kohya's names diffusers reads LoRA alone"),
    ]
    for updates, form, said in refused:
        with pytest.raises(InputError) as error:
            write(model, tmp_path / "a.safetensors", updates, form)
        assert said in str(error.value)
    write(model, tmp_path / "a.safetensors", {to_out: dora[to_out], Q: low}, "comfyui")
    with pytest.raises(InputError, match="name the base model with -c FILE"):
        export.suited(dora, FORMATS["comfyui"], None)


def test_a_file_that_is_another_update_gets_no_name(model: Transformer, tmp_path: Path, monkeypatch) -> None:
    for kind, spoiled in (("dora", DoraUpdate), ("lokr", LokrUpdate)):
        updates = trained(model, KINDS[kind])
        with monkeypatch.context() as patch:
            read = adapter_file.read

            def other(path: Path, spec, read=read, spoiled=spoiled) -> dict[str, Update]:
                found = read(path, spec)
                one = found[Q]
                if isinstance(one, DoraUpdate):
                    found[Q] = DoraUpdate(one.low, one.magnitude * 1.001, one.over_base)
                elif isinstance(one, LokrUpdate):
                    found[Q] = LokrUpdate(one.w1 * 1.001, one.w2, one.scale)
                return found

            patch.setattr(adapter_file, "read", other)
            with pytest.raises(RelayError, match=r"the update of transformer_blocks\.0\.attn\.to_q differs by"):
                write(model, tmp_path / "a.safetensors", updates, "comfyui")
        assert list(tmp_path.iterdir()) == []


def test_distances_are_those_of_the_matrices() -> None:
    one, other = (lokr_of(3, 4, 5, 2) for _ in range(2))
    first, second = (np.array(x.change(mx.zeros((15, 8)), 0), np.float64) for x in (one, other))
    expected = np.linalg.norm(first - second) / np.linalg.norm(first)
    assert one.distance(other) == pytest.approx(expected, rel=1e-5)
    assert one.distance(LokrUpdate(one.w1 * 2, one.w2, 0.5)) < 1e-7
    assert one.distance(lokr_of(5, 4, 3, 2)) == one.distance(None) == float("inf")
    low = Factors(mx.random.normal((2, 8)), mx.random.normal((15, 2)), 0.5)
    lengths = mx.arange(1.0, 16.0)
    dora = DoraUpdate(low, lengths)
    assert dora.distance(DoraUpdate(low, lengths * 1.5)) == pytest.approx(0.5)
    assert dora.distance(DoraUpdate(low.scaled(2.0), lengths)) == pytest.approx(1.0)
    assert (
        dora.distance(low)
        == dora.distance(DoraUpdate(low, lengths, over_base=True))
        == low.distance(dora)
        == float("inf")
    )
    assert np.isnan(dora.distance(DoraUpdate(low, lengths * float("nan"))))
    assert LokrUpdate(one.w1 * 0, one.w2, 1.0).is_zero()
