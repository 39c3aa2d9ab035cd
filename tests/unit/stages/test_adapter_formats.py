"""Adapters in the formats of other programs: names, algebra, round trips, headers, and the proof of each file."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import namings

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages.catalogue import CATALOGUE
from flux2_relay.stages.files import read_tensors
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_file, adapter_formats, adapter_proof, export
from flux2_relay.stages.train.adapter_formats import FORMATS
from flux2_relay.stages.train.updates import Factors

SPEC = TransformerSpec(
    double_blocks=2, single_blocks=2, heads=2, head_dim=4, context_width=12, guidance=True, rope_axes=(1, 1, 1, 1)
)
Q, K, V = (f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
QKV = "double_blocks.0.img_attn.qkv"
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)


def with_scale(of: namings.Pairs, scale: Callable[[int], float]) -> dict[str, Factors]:
    """`scale` of the rank."""
    return {path: Factors(a, b, scale(a.shape[0])) for path, (a, b) in of.items()}


def everything(rank: int = 4, scale: float = 2.0) -> dict[str, Factors]:
    """Every linear of the blocks; the scale is a power of two, so that folding it rounds nothing."""
    return with_scale(namings.pairs(SPEC, rank, outer=False), lambda _: scale)


def mixed() -> dict[str, Factors]:
    """Ranks that differ between q, k and v, all of alpha 8: three scales in one matrix."""
    of = {rank: namings.pairs(SPEC, rank, outer=False) for rank in (1, 2, 4)}
    ranks = {"to_q": 1, "to_k": 2, "add_v_proj": 2, "linear_in": 1}
    return with_scale({p: of[ranks.get(p.rpartition(".")[2], 4)][p] for p in of[4]}, lambda rank: 8 / rank)


def some() -> dict[str, Factors]:
    return {path: f for path, f in everything().items() if path.endswith((".to_q", ".to_v", ".add_k_proj", ".to_out"))}


def by_three() -> dict[str, Factors]:
    return everything(rank=6, scale=0.5)


def shared() -> dict[str, Factors]:
    """One A for q, k and v."""
    of = everything(rank=3)
    return {path: replace(f, a=of[Q].a) if path in (K, V) else f for path, f in of.items()}


ADAPTERS = pytest.mark.parametrize("make", [everything, mixed, some, by_three, shared], ids=lambda make: make.__name__)


def written(path: Path, of: Mapping[str, Factors], form: str, dtype: mx.Dtype = mx.float32) -> Path:
    export.write(path, of, SPEC, FORMATS[form], {}, dtype)
    return path


def product(factors: Factors) -> np.ndarray:
    """The update itself, by the same sums whoever asks."""
    return np.array((factors.b * factors.scale) @ factors.a)


@ADAPTERS
@pytest.mark.parametrize("forms", list(itertools.permutations(FORMATS, 3)), ids="-".join)
def test_round_trips_keep_every_bit_of_every_update(tmp_path: Path, make, forms: tuple[str, ...]) -> None:
    """Through all three formats, and to the first one again."""
    of = expected = make()
    for number, form in enumerate((*forms, forms[0])):
        of = adapter_file.read(written(tmp_path / f"{number}.safetensors", of, form), SPEC)
    assert of.keys() == expected.keys()
    for path, factors in expected.items():
        assert np.array_equal(product(of[path]), product(factors)), path
        assert of[path].a.shape == factors.a.shape, f"{path} has grown"


@EVERY_FORMAT
@pytest.mark.parametrize(("dtype", "limit"), [(mx.bfloat16, 6e-3), (mx.float16, 8e-4), (mx.float32, 1e-6)])
def test_an_alpha_that_rounds_costs_what_the_type_costs(tmp_path: Path, form: str, dtype, limit: float) -> None:
    of = with_scale(namings.pairs(SPEC, 3, outer=False), lambda rank: 0.7 / rank)
    difference = export.write(tmp_path / "a.safetensors", of, SPEC, FORMATS[form], {}, dtype)
    assert 0 < difference.error < limit
    found = adapter_file.read_file(tmp_path / "a.safetensors")
    assert found.dtype == dtype
    for path, factors in of.items():
        error = np.linalg.norm(product(found.factors[path]) - product(factors)) / np.linalg.norm(product(factors))
        assert error <= difference.error * 1.0001 + 1e-7, path


def test_q_k_and_v_are_block_diagonal_and_alpha_is_three_times_theirs(tmp_path: Path) -> None:
    of = with_scale(namings.pairs(SPEC, 2), lambda rank: 5 / rank)
    of = {path: of[path] for path in (Q, K, V)}
    values, _ = read_tensors(written(tmp_path / "a.safetensors", of, "kohya"))
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    assert set(values) == {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"}
    assert values[f"{key}.alpha"].item() == 15
    assert values[f"{key}.alpha"].shape == ()
    b = values[f"{key}.lora_up.weight"]
    assert (values[f"{key}.lora_down.weight"].shape, b.shape) == ((6, 8), (24, 6))
    for place, path in enumerate((Q, K, V)):
        assert mx.array_equal(b[8 * place : 8 * place + 8, 2 * place : 2 * place + 2], of[path].b)
    assert mx.sum(b != 0).item() == 3 * 8 * 2


def test_what_q_alone_has_leaves_zero_rows_for_k_and_v(tmp_path: Path) -> None:
    of = {K: everything()[K]}
    values, _ = read_tensors(written(tmp_path / "a.safetensors", of, "comfyui"))
    b = values[f"diffusion_model.{QKV}.lora_B.weight"]
    assert b.shape == (24, 4)
    assert mx.array_equal(b[8:16], of[K].b * 2)
    assert not mx.any(b[:8]).item()
    assert not mx.any(b[16:]).item()


def test_one_a_for_all_three_stays_one(tmp_path: Path) -> None:
    of = shared()
    values, _ = read_tensors(written(tmp_path / "a.safetensors", of, "comfyui"))
    assert values[f"diffusion_model.{QKV}.lora_A.weight"].shape == (3, 8)
    assert values["diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight"].shape == (9, 8)


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
def test_folded_files_hold_no_alpha(tmp_path: Path, form: str) -> None:
    """With one, diffusers refuses the file; in the metadata alone, ComfyUI does not see it."""
    path = written(tmp_path / "a.safetensors", everything(), form)
    values, metadata = read_tensors(path)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in values)
    assert "lora_adapter_metadata" not in metadata


def test_the_halves_of_norm_out_change_places(tmp_path: Path) -> None:
    of = {"norm_out.linear": with_scale(namings.pairs(SPEC), lambda _: 1.0)["norm_out.linear"]}
    b = of["norm_out.linear"].b
    path = written(tmp_path / "a.safetensors", of, "comfyui")
    theirs = read_tensors(path)[0]["diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"]
    assert mx.array_equal(theirs, mx.concatenate([b[8:], b[:8]]))
    assert mx.array_equal(adapter_file.read(path, SPEC)["norm_out.linear"].b, b)
    ours = read_tensors(written(tmp_path / "b.safetensors", of, "diffusers"))[0]
    assert mx.array_equal(ours["transformer.norm_out.linear.lora_B.weight"], b)


def test_modules_that_a_format_cannot_carry_are_refused_by_name(tmp_path: Path) -> None:
    of = with_scale(namings.pairs(SPEC), lambda _: 1.0)
    with pytest.raises(InputError) as refused:
        written(tmp_path / "a.safetensors", of, "kohya")
    named = {path for path in of if f"{path}: " in str(refused.value)}
    assert named == {outer.module for outer in namings.OUTER if outer.diffusers["kohya"] != "ok"}
    assert not (tmp_path / "a.safetensors").exists()
    written(tmp_path / "b.safetensors", {path: of[path] for path in of if path not in named}, "kohya")


@EVERY_FORMAT
def test_remarks_name_what_others_would_not_read(form: str) -> None:
    of = with_scale(namings.pairs(SPEC), lambda _: 1.0)
    said = {remark.partition(":")[0] for remark in adapter_formats.remarks(FORMATS[form], of)}
    refused = {outer.module for outer in namings.OUTER if form == "kohya"}
    bad = {o.module for o in namings.OUTER if {o.diffusers[form], o.comfyui[form]} != {"ok"}}
    assert said == bad - refused


@EVERY_FORMAT
def test_an_identity_keeps_its_factors(tmp_path: Path, form: str) -> None:
    """B is zero before the first step: nothing tells whose the columns of a fused B are, but their number."""
    of = {path: replace(f, b=mx.zeros_like(f.b)) for path, f in everything().items()}
    found = adapter_file.read(written(tmp_path / "a.safetensors", of, form), SPEC)
    assert found.keys() == of.keys()
    assert all(mx.array_equal(found[path].a, of[path].a) and not mx.any(found[path].b).item() for path in of)
    assert adapter_proof.is_zero(of)
    assert not adapter_proof.is_zero(everything())


# The proof


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, mx.array]], None]) -> None:
    make = adapter_formats.tensors

    def spoiled(*given) -> dict[str, mx.array]:
        values = make(*given)
        change(values)
        return values

    monkeypatch.setattr(adapter_formats, "tensors", spoiled)


def a_third_of_the_strength(values: dict[str, mx.array]) -> None:
    values["lora_unet_double_blocks_0_img_attn_qkv.alpha"] /= 3


def a_module_less(values: dict[str, mx.array]) -> None:
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        del values[f"lora_unet_single_blocks_1_linear2.{part}"]


def rows_in_another_order(values: dict[str, mx.array]) -> None:
    name = "lora_unet_double_blocks_1_img_mlp_0.lora_up.weight"
    values[name] = mx.concatenate([values[name][1:], values[name][:1]])


@pytest.mark.parametrize(
    ("change", "module"),
    [
        (a_third_of_the_strength, "transformer_blocks.0.attn.to_"),
        (a_module_less, "single_transformer_blocks.1.attn.to_out"),
        (rows_in_another_order, "transformer_blocks.1.ff.linear_in"),
    ],
)
def test_a_file_that_is_not_the_adapter_never_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, module: str
) -> None:
    spoil(monkeypatch, change)
    (tmp_path / "a.safetensors").write_text("the one of before")
    with pytest.raises(RelayError, match="was not written") as told:
        written(tmp_path / "a.safetensors", everything(), "kohya")
    assert module in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "the one of before"


def test_float16_is_refused_where_it_cannot_hold_the_numbers(tmp_path: Path) -> None:
    of = everything()
    of[Q] = replace(of[Q], b=of[Q].b * 1e-8)
    with pytest.raises(RelayError, match=r"to_q differs .* float16 .* float32"):
        written(tmp_path / "a.safetensors", of, "diffusers", mx.float16)
    of[Q] = replace(of[Q], b=of[Q].b * 1e14)
    with pytest.raises(RelayError, match="to_q"):
        written(tmp_path / "a.safetensors", of, "diffusers", mx.float16)
    assert written(tmp_path / "a.safetensors", of, "diffusers", mx.bfloat16).exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    of = everything()
    of[K] = replace(of[K], a=of[K].a * mx.array(float("nan")))
    with pytest.raises(InputError, match=rf"not finite:\n  {K}$"):
        written(tmp_path / "a.safetensors", of, "diffusers")


def test_the_difference_is_that_of_the_products() -> None:
    """Against the products themselves, of two ranks."""
    one, other = everything(rank=4)[Q], everything(rank=3)[Q]
    expected = np.linalg.norm(product(one) - product(other)) / np.linalg.norm(product(one))
    assert adapter_proof.largest({Q: one}, {Q: other}).error == pytest.approx(expected, rel=1e-5)
    assert adapter_proof.largest({Q: one}, {}).error == pytest.approx(1)
    assert adapter_proof.largest({}, {Q: one}).error == np.inf
    near = replace(one, b=one.b * (1 + 1e-6))
    assert adapter_proof.largest({Q: one}, {Q: near}).error == pytest.approx(1e-6, rel=0.1)
    assert adapter_proof.largest({Q: one, K: one}, {Q: near, K: other}).module == K


# Sizes and headers


@pytest.mark.parametrize("part", ["to_q", "ff.linear_in", "ff_context.linear_out", "to_qkv_mlp_proj", "attn.to_out"])
@EVERY_FORMAT
def test_a_file_tells_the_sizes_of_its_model(tmp_path: Path, form: str, part: str) -> None:
    """From one kind of module alone: enough to name what does not fit."""
    of = {path: factors for path, factors in everything().items() if path.endswith(part)}
    path = written(tmp_path / "a.safetensors", of, form)
    found = adapter_file.read_file(path)
    assert found.spec.hidden == SPEC.hidden
    assert found.spec.mlp_width == SPEC.mlp_width
    assert found.factors.keys() == of.keys()
    again, once = (read_tensors(p)[0] for p in (written(tmp_path / "b.safetensors", found.factors, form), path))
    assert again.keys() == once.keys()
    assert all(mx.array_equal(again[name], once[name]) for name in once)


@EVERY_FORMAT
def test_without_a_model_too_the_one_wrong_shape_is_named(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "a.safetensors", everything(), form)
    values, _ = read_tensors(path)
    for name in (name for name in values if "linear" in name or "mlp" in name):
        if not name.endswith("alpha"):
            mx.save_safetensors(str(path), {**values, name: mx.concatenate([values[name]] * 2, axis=1)})
            with pytest.raises(InputError) as refused:
                adapter_file.read_file(path)
            wrong = {line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]}
            assert name in wrong
            assert len(wrong) <= 2, "and its partner, where the ranks differ"


@pytest.mark.parametrize("name", CATALOGUE)
def test_released_models_are_told_by_their_width(tmp_path: Path, name: str) -> None:
    spec, path = CATALOGUE[name][0], f"{tmp_path}/a.safetensors"
    width = spec.hidden
    values = {f"double_blocks.3.img_attn.proj.lora_A.{w}": mx.zeros((1, width)) for w in ("weight",)}
    values["double_blocks.3.img_attn.proj.lora_B.weight"] = mx.zeros((width, 1))
    mx.save_safetensors(path, values)
    found = adapter_file.read_file(path)
    assert found.spec == spec
    export.write(Path(path), found.factors, found.spec, FORMATS["kohya"], {}, mx.float32)
    family = name.replace("-base", "")
    said = read_tensors(Path(path))[1]
    assert said["modelspec.architecture"] == f"Flux.2-{family}/lora"
    assert said["ss_base_model_version"] == f"flux_2_{family.replace('-', '_')}"
    values["double_blocks.30.img_attn.proj.lora_A.weight"] = mx.zeros((1, width))
    mx.save_safetensors(path, values)
    with pytest.raises(InputError, match=r"double_blocks\.30\..*no linear of that name"):
        adapter_file.read_file(path)


def test_what_names_no_linear_of_flux_2_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for values in ({"lora_te_text_model.lora_down.weight": mx.zeros((2, 8))}, {"some.tensor": mx.zeros((2, 8))}, {}):
        mx.save_safetensors(str(path), values)
        with pytest.raises(InputError, match=r"no LoRA for FLUX\.2") as refused:
            adapter_file.read_file(path)
        assert all(name in str(refused.value) for name in values if name.startswith("some"))


def test_headers_say_what_their_readers_look_for(tmp_path: Path) -> None:
    said = {"flux2_relay.trigger": "fox", "lora_adapter_metadata": "{}", "sshs_model_hash": "1", "ss_network_dim": "99"}
    said |= {"modelspec.title": "fox", "modelspec.sai_model_spec": "1.0.0", "ss_network_alpha": "1"}
    found = {}
    for form in FORMATS:
        export.write(tmp_path / f"{form}.safetensors", everything(), SPEC, FORMATS[form], said, mx.float32)
        found[form] = read_tensors(tmp_path / f"{form}.safetensors")[1]
    for form, header in found.items():
        own = {"flux2_relay.trigger": "fox", "flux2_relay.rank": "4", "flux2_relay.alpha": "8", "format": "pt"}
        own |= {"modelspec.title": "fox", "modelspec.sai_model_spec": "1.0.0"}
        assert own.items() <= header.items(), form
        assert not {"lora_adapter_metadata", "sshs_model_hash"} & header.keys()
        kohya = {key: value for key, value in header.items() if key.startswith("ss_network_")}
        assert bool(kohya) == (form == "kohya")
    assert found["kohya"]["ss_network_module"] == "networks.lora_flux_2"
    assert (found["kohya"]["ss_network_dim"], found["kohya"]["ss_network_alpha"]) == ("4", "8")
    export.write(tmp_path / "m.safetensors", mixed(), SPEC, FORMATS["kohya"], {}, mx.float32)
    header = read_tensors(tmp_path / "m.safetensors")[1]
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "8")
