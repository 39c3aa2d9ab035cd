"""Which linears get an adapter, how it starts, and what may be loaded into it."""

# pyright: reportGeneralTypeIssues=false

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import spec
from flux2_relay.stages.train import lora
from flux2_relay.stages.train.lora import LoraOptions
from flux2_relay.stages.train.transformer import Transformer, block_linears, load_transformer

DOUBLE = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.fixture(scope="module")
def loaded(dev: Path) -> Transformer:
    return load_transformer(dev, spec.read_transformer_spec(dev / "transformer"), bits=32)


@pytest.fixture
def transformer(loaded: Transformer) -> Transformer:
    loaded.adapters = {}
    return loaded


def targets(transformer: Transformer, **options) -> list[str]:
    return list(lora.targets(transformer.spec, LoraOptions(**options)))


def test_blocks_are_every_linear_of_both_kinds(transformer: Transformer) -> None:
    chosen = lora.targets(transformer.spec, LoraOptions())
    assert chosen == block_linears(transformer.spec)
    assert len(chosen) == 2 * 12 + 2 * 2
    assert chosen["single_transformer_blocks.1.attn.to_qkv_mlp_proj"] == (3 * 64 + 2 * 192, 64)


def test_attention_has_the_fused_linears_of_single_blocks(transformer: Transformer) -> None:
    double = {f"transformer_blocks.{n}.attn.{name}" for n in (0, 1) for name in DOUBLE}
    single = {f"single_transformer_blocks.{n}.attn.{name}" for n in (0, 1) for name in ("to_qkv_mlp_proj", "to_out")}
    assert set(targets(transformer, targets="attention")) == double | single


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("to_q",), {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"}),
        (("to_out",), {"single_transformer_blocks.0.attn.to_out", "single_transformer_blocks.1.attn.to_out"}),
        (("attn.to_out.0",), {"transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0"}),
        (("transformer_blocks.1.ff.linear_in",), {"transformer_blocks.1.ff.linear_in"}),
        (
            ("single*.0.*", "transformer_blocks.0.*add_?_proj"),
            {
                "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
                "single_transformer_blocks.0.attn.to_out",
                *(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"),
            },
        ),
    ],
)
def test_patterns_name_modules_endings_and_shell_patterns(transformer: Transformer, patterns, expected) -> None:
    assert set(targets(transformer, targets=patterns)) == expected


def test_a_group_may_stand_among_patterns(transformer: Transformer) -> None:
    assert len(targets(transformer, targets=("attention", "ff.linear_in"))) == 2 * 8 + 2 * 2 + 2


def test_excluded_modules_get_none(transformer: Transformer) -> None:
    left = targets(transformer, targets="attention", exclude=("single*", "to_add_out"))
    assert set(left) == {f"transformer_blocks.{n}.attn.{name}" for n in (0, 1) for name in DOUBLE[:-1]}


def test_every_idle_pattern_is_named(transformer: Transformer) -> None:
    options = {"targets": ("to_q", "to_qq"), "exclude": ("ff.linear",), "ranks": {"attn.to_k": 2, "blocks.7.*": 3}}
    with pytest.raises(InputError) as refused:
        targets(transformer, **options)
    message = str(refused.value)
    assert all(line in message for line in ("lora.targets: 'to_qq'", "lora.exclude: 'ff.linear'"))
    assert "lora.ranks: 'blocks.7.*'" in message
    assert "to_k" not in message


def test_nothing_left_is_refused(transformer: Transformer) -> None:
    with pytest.raises(InputError, match="leave no linear"):
        targets(transformer, targets="attention", exclude=("attention",))


def test_adapters_start_as_the_base_model(transformer: Transformer) -> None:
    lora.attach(transformer, LoraOptions(rank=4, alpha=6.0, ranks={"ff.linear_out": 2}), seed=1)
    named = lora.parameters(transformer)
    assert len(named) == 2 * len(transformer.adapters) == 56
    assert named["transformer_blocks.0.ff.linear_out.lora_A.weight"].shape == (2, 192)
    assert named["transformer_blocks.0.ff.linear_in.lora_B.weight"].shape == (384, 4)
    for path, (a, b, scale, _) in transformer.adapters.items():
        rank = 2 if path.endswith("ff.linear_out") else 4
        assert a.dtype == b.dtype == mx.float32
        assert scale.item() == 6.0 / rank
        assert not b.any()
        values, bound = np.array(a), 1 / np.sqrt(a.shape[1])
        assert np.abs(values).max() <= bound
        assert abs(values.std() - bound / np.sqrt(3)) < 0.1 * bound  # uniform, not normal


def test_the_start_of_a_module_depends_on_seed_and_path_alone(transformer: Transformer) -> None:
    def start(seed: int, **options) -> dict[str, mx.array]:
        lora.attach(transformer, LoraOptions(rank=4, **options), seed)
        return lora.parameters(transformer)

    every, few, other = start(1), start(1, targets=("to_k", "to_out")), start(2)
    assert all(mx.array_equal(every[name], value) for name, value in few.items())
    name = "transformer_blocks.0.attn.to_k.lora_A.weight"
    assert not mx.array_equal(every[name], other[name])
    assert not mx.array_equal(every[name], every[name.replace("to_k", "to_q")])


def test_weights_are_set_and_scales_stay(transformer: Transformer) -> None:
    lora.attach(transformer, LoraOptions(rank=2, alpha=3.0, targets=("to_q",)), seed=1)
    values = {name: mx.ones_like(value) for name, value in lora.parameters(transformer).items()}
    lora.load(transformer, values)
    assert all(value.min().item() == 1 for value in lora.parameters(transformer).values())
    assert {scale.item() for _, _, scale, _ in transformer.adapters.values()} == {1.5}


def test_weights_that_do_not_fit_are_all_named(transformer: Transformer) -> None:
    lora.attach(transformer, LoraOptions(rank=2, targets=("to_q", "to_k")), seed=1)
    before = values = lora.parameters(transformer)
    values = dict(values)
    del values["transformer_blocks.0.attn.to_q.lora_B.weight"]
    values["transformer_blocks.0.attn.to_v.lora_B.weight"] = mx.zeros((64, 2))
    values["transformer_blocks.1.attn.to_k.lora_A.weight"] = mx.zeros((3, 64))
    with pytest.raises(InputError) as refused:
        lora.load(transformer, values)
    message = str(refused.value)
    assert "transformer_blocks.0.attn.to_q.lora_B.weight is missing" in message
    assert "transformer_blocks.0.attn.to_v.lora_B.weight belongs to no adapter" in message
    assert "transformer_blocks.1.attn.to_k.lora_A.weight: expected (2, 64), found (3, 64)" in message
    assert all(mx.array_equal(before[name], value) for name, value in lora.parameters(transformer).items())
