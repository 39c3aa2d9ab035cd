"""LoRA files in the namings of other programs: each means the weights that were written, and faults are named."""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import namings, ours
from tiny.namings import NAMINGS, Values

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_file, export, init, lora
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.transformer import block_linears

SPEC = TransformerSpec(
    double_blocks=2, single_blocks=2, heads=2, head_dim=4, context_width=12, guidance=True, rope_axes=(1, 1, 1, 1)
)
Updates = dict[str, np.ndarray]


def factors(rank: int = 2) -> namings.Pairs:
    """A and B of every linear, in diffusers' names."""
    return namings.pairs(SPEC, rank)


def updates(of: namings.Pairs, scale: float) -> Updates:
    return {path: scale * np.array(b @ a) for path, (a, b) in of.items()}


def named(of: namings.Pairs, pattern: str, underscores: bool = False) -> Values:
    """`{}` stands for the module, `<a|b>` for what A and B are called."""
    before, _, rest = pattern.partition("<")
    between, _, behind = rest.partition(">")
    a_name, b_name = between.split("|")
    values = {}
    for path, (a, b) in of.items():
        front = before.replace("{}", path.replace(".", "_") if underscores else path)
        values |= {front + a_name + behind: a, front + b_name + behind: b}
    return values


def write(path: Path, values: Values, metadata: dict[str, str] | None = None) -> Path:
    mx.save_safetensors(str(path), values, metadata or {})
    return path


def found_in(path: Path) -> Updates:
    return {name: f.scale * np.array(f.b @ f.a) for name, f in adapter_file.read(path, SPEC).items()}


def assert_same(found: Updates, expected: Updates) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: f"{n.module}-{n.factors[0]}-{n.alpha}")
def test_every_naming_at_its_strength(tmp_path: Path, naming: namings.Naming) -> None:
    of = factors()
    values, metadata = namings.file_of(naming, of, 1.5)
    assert_same(found_in(write(tmp_path / "a.safetensors", values, metadata)), updates(of, 1.5))


@pytest.mark.parametrize(
    "pattern",
    [
        "diffusion_model.{}.<lora_A|lora_B>.some_name.weight",
        "lycoris_{}.<lora_down|lora_up>.weight",
        "{}<.lora_linear_layer.down|.lora_linear_layer.up>.weight",
        "{}<_lora.down|_lora.up>.weight",
    ],
)
def test_namings_that_only_one_program_reads(tmp_path: Path, pattern: str) -> None:
    of = factors()
    values = named(of, pattern, underscores=pattern.startswith("lycoris"))
    assert_same(found_in(write(tmp_path / "a.safetensors", values)), updates(of, 1.0))


def test_what_mflux_writes(tmp_path: Path) -> None:
    """Its own paths: no `.0`, and no level between the time embedding and its linears."""
    of = factors()
    theirs = {
        re.sub(r"(\.attn\.to_out)\.0$", r"\1", path).replace("timestep_embedder.linear", "linear"): pair
        for path, pair in of.items()
    }
    assert theirs.keys() != of.keys()
    values = named(theirs, "transformer.{}.<lora_A|lora_B>.weight")
    assert_same(found_in(write(tmp_path / "a.safetensors", values)), updates(of, 1.0))


def test_alpha_as_a_tensor_of_one_element_and_half_precision(tmp_path: Path) -> None:
    path = "transformer_blocks.1.attn.to_q"
    of = {path: factors()[path]}
    values = {n: v.astype(mx.bfloat16) for n, v in named(of, "transformer.{}.<lora_A|lora_B>.weight").items()}
    values[f"transformer.{path}.alpha"] = mx.array([6.0])
    (found,) = adapter_file.read(write(tmp_path / "a.safetensors", values), SPEC).values()
    assert found.scale == 3.0
    assert found.a.dtype == found.b.dtype == mx.float32


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"lora_alpha": 6, "r": 2}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"attn.to_q": 1}}, 0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"to_k": 1}}, 3.0),
        ({}, 1.0),
    ],
)
def test_alpha_in_the_metadata(tmp_path: Path, fields: dict, scale: float) -> None:
    path = "transformer_blocks.1.attn.to_q"
    values = named({path: factors()[path]}, "transformer.{}.<lora_A|lora_B>.weight")
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in fields.items()})}
    (found,) = adapter_file.read(write(tmp_path / "a.safetensors", values, metadata), SPEC).values()
    assert found.scale == pytest.approx(scale)


def test_one_a_shared_by_q_k_and_v(tmp_path: Path) -> None:
    a, b = namings.random((2, 8), "a"), namings.random((24, 2), "b")
    values = named({"double_blocks.1.txt_attn.qkv": (a, b)}, "diffusion_model.{}.<lora_A|lora_B>.weight")
    found = adapter_file.read(write(tmp_path / "a.safetensors", values), SPEC)
    assert list(found) == [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"]
    for place, part in enumerate(found.values()):
        assert mx.array_equal(part.a, a)
        assert mx.array_equal(part.b, b[8 * place : 8 * place + 8])


def test_parts_of_a_fused_module_get_their_own_rank_back(tmp_path: Path) -> None:
    of = factors()
    found = adapter_file.read(
        write(tmp_path / "a.safetensors", named(namings.bfl(of), "diffusion_model.{}.<lora_A|lora_B>.weight")), SPEC
    )
    assert {factors.a.shape[0] for factors in found.values()} == {2}
    del of["transformer_blocks.0.attn.to_k"]
    only_two = factors()
    a, b = only_two["transformer_blocks.0.attn.to_k"]
    only_two["transformer_blocks.0.attn.to_k"] = a, mx.zeros_like(b)
    values = named(namings.bfl(only_two), "diffusion_model.{}.<lora_A|lora_B>.weight")
    assert_same(found_in(write(tmp_path / "b.safetensors", values)), updates(of, 1.0))


def test_our_own_files_are_read_at_their_strength(tmp_path: Path, dev: Path) -> None:
    model = ours.load(dev)
    lora.attach(model, LoraOptions(rank=2, alpha=5.0, ranks={"to_k": 3}), seed=0)
    values = {name: namings.random(value.shape, name) for name, value in lora.parameters(model).items()}
    lora.load(model, values)
    export.write_finished(model, tmp_path / "exported.safetensors", {"flux2_relay.alpha": "5.0"})
    metadata = lora.metadata(model, LoraOptions(rank=2, alpha=5.0, ranks={"to_k": 3}))
    write(tmp_path / "checkpoint.safetensors", lora.parameters(model), metadata)
    expected = {path: np.array(scale * (b @ a)) for path, (a, b, scale, _) in model.adapters.items()}
    for name in ("exported", "checkpoint"):
        found = adapter_file.read(tmp_path / f"{name}.safetensors", model.spec)
        assert_same({path: f.scale * np.array(f.b @ f.a) for path, f in found.items()}, expected)


Q = "transformer.transformer_blocks.0.attn.to_q"


def without_b(values: Values) -> None:
    del values[f"{Q}.lora_B.weight"]


def with_alpha_alone(values: Values) -> None:
    values["lora_unet_single_blocks_1_linear1.alpha"] = mx.array(1.0)


def with_wrong_columns(values: Values) -> None:
    values[f"{Q}.lora_A.weight"] = mx.zeros((2, 9))


def with_another_rank(values: Values) -> None:
    values[f"{Q}.lora_B.weight"] = mx.zeros((8, 3))


def with_an_unknown_module(values: Values) -> None:
    values["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"] = mx.zeros((2, 8))


def with_another_kind(values: Values) -> None:
    values[f"{Q}.hada_w1_a"] = mx.zeros((2, 8))


def with_two_kinds(values: Values) -> None:
    values[f"{Q}.lokr_w1"] = mx.zeros((2, 8))
    values[f"{Q}.lokr_w2"] = mx.zeros((4, 1))


def with_half_a_kronecker_product(values: Values) -> None:
    values.clear()
    values.update({f"{Q}.lokr_w1": mx.zeros((2, 2)), f"{Q}.lokr_w2_a": mx.zeros((4, 1))})


def with_another_product(values: Values) -> None:
    values.clear()
    values.update({f"{Q}.lokr_w1": mx.zeros((2, 2)), f"{Q}.lokr_w2": mx.zeros((4, 5))})


def with_a_product_that_cannot_be_cut(values: Values) -> None:
    values.clear()
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    values.update({f"{key}.lokr_w1": mx.zeros((4, 2)), f"{key}.lokr_w2": mx.zeros((6, 4))})


def with_lengths_of_columns(values: Values) -> None:
    values[f"{Q}.dora_scale"] = mx.zeros((1, 8))


def with_integers(values: Values) -> None:
    values[f"{Q}.lora_A.weight"] = mx.zeros((2, 8), mx.uint8)


def with_two_namings(values: Values) -> None:
    values["transformer_blocks.0.attn.to_q.lora_A.weight"] = mx.zeros((2, 8))


def with_a_list_of_alphas(values: Values) -> None:
    values[f"{Q}.alpha"] = mx.zeros(2)


def with_one_module_in_two_namings(values: Values) -> None:
    values["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"] = mx.zeros((2, 8))
    values["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"] = mx.zeros((24, 2))


FAULTS = {
    with_one_module_in_two_namings: "transformer_blocks.0.attn.to_q stands there twice",
    without_b: f"{Q}.lora_A.weight: factor B of transformer_blocks_0_attn_to_q is missing",
    with_alpha_alone: "lora_unet_single_blocks_1_linear1.alpha: factor A and factor B",
    with_wrong_columns: f"{Q}.lora_A.weight: expected rank x 8, found 2 x 9",
    with_another_rank: f"{Q}.lora_B.weight: expected 8 x 2, found 8 x 3",
    with_an_unknown_module: "transformer_blocks.7.attn.to_q.lora_A.weight: this model has no linear of that name",
    with_another_kind: f"{Q}.hada_w1_a is no factor of a LoRA",
    with_two_kinds: f"{Q}.lora_A.weight, {Q}.lora_B.weight: cannot stand beside factors of LoKr",
    with_half_a_kronecker_product: "lokr_w2 of transformer_blocks_0_attn_to_q, whole or as lokr_w2_a and lokr_w2_b, is",
    with_another_product: "expected 8 x 8 of their product, found 8 x 10",
    with_a_product_that_cannot_be_cut: "cannot be cut into the 3 parts of double_blocks_0_img_attn_qkv",
    with_lengths_of_columns: f"{Q}.dora_scale: expected a length for each of 8 rows, found 1 x 8",
    with_integers: f"{Q}.lora_A.weight has type",
    with_two_namings: "transformer_blocks.0.attn.to_q.lora_A.weight",
    with_a_list_of_alphas: f"{Q}.alpha: expected one number, found 2",
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_faults_are_named(tmp_path: Path, spoil) -> None:
    path = "transformer_blocks.0.attn.to_q"
    values = named({path: factors()[path]}, "transformer.{}.<lora_A|lora_B>.weight")
    spoil(values)
    with pytest.raises(InputError) as refused:
        adapter_file.read(write(tmp_path / "a.safetensors", values), SPEC)
    assert FAULTS[spoil] in str(refused.value)
    assert str(tmp_path / "a.safetensors") in str(refused.value)


def test_what_is_no_adapter_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        adapter_file.read(tmp_path / "none.safetensors", SPEC)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(InputError, match=r"text\.safetensors"):
        adapter_file.read(tmp_path / "text.safetensors", SPEC)
    values = named({"x_embedder": factors()["x_embedder"]}, "{}.<lora_A|lora_B>.weight")
    with pytest.raises(InputError, match="lora_adapter_metadata"):
        adapter_file.read(write(tmp_path / "b.safetensors", values, {"lora_adapter_metadata": "[1]"}), SPEC)


# Starting from one


def test_a_start_is_the_update_of_the_file(tmp_path: Path, dev: Path) -> None:
    """Of a lower rank and another strength; what the file lacks starts fresh."""
    model = ours.load(dev)
    rows, columns = block_linears(model.spec)["transformer_blocks.0.attn.to_q"]
    a, b = namings.random((2, columns), "a"), namings.random((rows, 2), "b")
    values = named({"transformer_blocks.0.attn.to_q": (a, b)}, "transformer.{}.<lora_A|lora_B>.weight")
    values["transformer.transformer_blocks.0.attn.to_q.alpha"] = mx.array(5.0)
    file = write(tmp_path / "a.safetensors", values)
    options = LoraOptions(rank=4, alpha=8.0, targets=("to_q",), init=str(file))
    lora.attach(model, options, seed=1)
    fresh = dict(model.adapters)
    init.start(model, options)
    started_a, started_b, scale, _ = model.adapters["transformer_blocks.0.attn.to_q"]
    np.testing.assert_allclose(np.array(scale * started_b @ started_a), 2.5 * np.array(b @ a), rtol=1e-5, atol=1e-5)
    assert started_a.shape == (4, columns)
    assert mx.array_equal(started_a[2:], fresh["transformer_blocks.0.attn.to_q"][0][2:])
    other = "transformer_blocks.1.attn.to_q"
    assert all(mx.array_equal(x, y) for x, y in zip(model.adapters[other][:3], fresh[other][:3], strict=True))


def test_what_cannot_be_taken_over_whole_is_refused(tmp_path: Path) -> None:
    of = {path: factors(4)[path] for path in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")}
    file = write(tmp_path / "a.safetensors", named(of, "transformer.{}.<lora_A|lora_B>.weight"))
    with pytest.raises(InputError) as refused:
        init.read(LoraOptions(rank=2, targets=("to_q",), init=str(file)), SPEC)
    assert "transformer_blocks.0.attn.to_q has rank 4 there and 2 here" in str(refused.value)
    assert "transformer_blocks.0.attn.to_k is not among lora.targets" in str(refused.value)
    assert len(init.read(LoraOptions(rank=2, ranks={"to_q": 4, "to_k": 5}, init=str(file)), SPEC)) == 2
