"""Configs of several runs: which combinations, under which names, and what is refused."""

from pathlib import Path

import pytest

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import sweep
from flux2_relay.pipeline.config import dump_config, load_config

BASE = "model: {path: somewhere}\nrun: {name: fox}\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(BASE)
    return file


def names(*arguments: object) -> list[str]:
    return [config.run.name for config in sweep.expand(*arguments)]  # pyright: ignore[reportArgumentType]


def test_every_combination_is_a_run_of_its_own_name(base: Path) -> None:
    configs = sweep.expand([base], ["train.steps=7"], ["lora.rank=8,16", "train.lr=1e-4,3e-4"])
    found = [(config.run.name, config.lora.rank, config.train.lr, config.train.steps) for config in configs]
    assert found == [
        ("fox-rank8-lr1e-4", 8, 1e-4, 7),
        ("fox-rank8-lr3e-4", 8, 3e-4, 7),
        ("fox-rank16-lr1e-4", 16, 1e-4, 7),
        ("fox-rank16-lr3e-4", 16, 3e-4, 7),
    ]


def test_without_a_sweep_the_config_is_what_it_says(base: Path) -> None:
    assert sweep.expand([base], [], []) == [load_config(base)]


def test_a_section_of_the_file_says_the_same_and_the_command_line_goes_before_it(base: Path) -> None:
    base.write_text(
        BASE + "sweep:\n  lora.rank: [8, 16]\n  train.betas: [[0.9, 0.99], [0.8, 0.9]]\n  train.ema: [null]\n"
    )
    configs = sweep.expand([base], [], ["lora.rank=4"])
    assert [(c.lora.rank, c.train.betas, c.train.ema) for c in configs] == [
        (4, b, None) for b in ((0.9, 0.99), (0.8, 0.9))
    ]
    assert [config.sweep for config in configs] == [{}, {}]
    written = base.with_name("resolved.yaml")
    written.write_text(dump_config(load_config(base)))
    assert names([written], [], []) == names([base], [], [])
    assert len(names([base], [], [])) == 4


def test_values_may_be_lists_and_text_and_names_stay_names_of_folders(base: Path) -> None:
    assert names([base], [], ["lora.targets=[to_q, to_k],attention"]) == [
        "fox-targets-to_q-to_k",
        "fox-targets-attention",
    ]
    assert sweep.expand([base], [], ["lora.targets=[to_q, to_k]"])[0].lora.targets == ("to_q", "to_k")
    (config,) = sweep.expand([base], [], ['model.vae="a/b, c: d"'])
    assert (config.run.name, config.model.vae) == ("fox-vae-a-b-c-d", "a/b, c: d")
    assert names([base], [], ["save.every=5", "validation.every=7"]) == ["fox-save.every5-validation.every7"]
    assert names([base], [], ["run.name=cat,dog", "run.seed=1,2"]) == [
        *("cat-seed1", "cat-seed2", "dog-seed1", "dog-seed2"),
    ]


def test_several_configs_are_runs_beside_each_other(base: Path) -> None:
    other = base.with_name("other.yaml")
    other.write_text("model: {path: somewhere}\nrun: {name: cat}\nsweep: {lora.rank: [2, 3]}\n")
    assert names([base, other], [], ["run.seed=5"]) == ["fox-seed5", "cat-rank2-seed5", "cat-rank3-seed5"]


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (["lora.rank="], "--sweep lora.rank=: write it as key.path=value,value"),
        (["lora.rank"], "write it as key.path=value,value"),
        (["lora.rank=[1"], "this is not YAML"),
        (["sweep.lora=1"], "write it as key.path=value,value"),
        (["lora.rnk=1,2"], "did you mean 'lora.rank'"),
        (["lora.rank=a,b"], "sweep of lora.rank=a.*\n.*sweep of lora.rank=b"),
        (["lora.rank=3,3"], "several runs would have the same folder: .*fox-rank3"),
    ],
)
def test_what_makes_no_runs_is_refused(base: Path, sweeps: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sweep.expand([base], [], sweeps)


@pytest.mark.parametrize("section", ["lora.rank: []", "lora.rank: 3", "sweep.x: [1]"])
def test_a_section_that_makes_none_is_refused(base: Path, section: str) -> None:
    base.write_text(f"{BASE}sweep: {{{section}}}\n")
    with pytest.raises(InputError, match="sweep"):
        sweep.expand([base], [], [])
