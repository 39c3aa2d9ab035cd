"""The config file: every section and key, round trips, and what is said about mistakes."""

import dataclasses
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.config import Config, ModelOptions, RunOptions, dump_config, load_config
from flux2_relay.stages.train.options import PreviewOptions, PromptOptions

# Every section and key that the documentation names; a key may be added here, never dropped or renamed.
KEYS = {
    "run": "name dir seed",
    "model": "name path text_encoder tokenizer vae",
    "data": "path captions trigger repeats resolutions upscale crop flip background masks references prior",
    "encode": "bits stream batch_tokens",
    "cache": "path dtype latents_dtype codec",
    "lora": "kind rank alpha factor targets exclude ranks dropout init",
    "train": "steps batch accumulate lr schedule warmup optimizer betas eps weight_decay clip sigma "
    "sigma_shift weighting guidance caption_dropout prior_weight ema dtype",
    "memory": "budget bits stream",
    "validation": "fraction every",
    "save": "every keep dtype",
    "previews": "every prompts size steps guidance seed",
    "log": "tensorboard",
}
DEFAULTS = """
run: {seed: 0, dir: runs}
model: {name: auto, path: model, text_encoder: null, tokenizer: null, vae: null}
data:
  - path: data/fox
    captions: whole
    trigger: null
    repeats: 1
    resolutions: [512]
    upscale: false
    crop: center
    flip: false
    background: white
    masks: null
    references: []
    prior: false
encode: {bits: 8, stream: auto, batch_tokens: 8192}
cache: {path: store.zarr, dtype: bfloat16, latents_dtype: float16, codec: zstd}
lora: {kind: lora, rank: 16, alpha: 16, factor: 16, targets: blocks, exclude: [], ranks: {}, dropout: 0.0, init: null}
train:
  steps: 1000
  batch: 1
  accumulate: 1
  lr: 1.0e-4
  schedule: constant
  warmup: 0
  optimizer: adamw
  betas: [0.9, 0.999]
  eps: 1.0e-8
  weight_decay: 0.01
  clip: 1.0
  sigma: flux2_shift
  sigma_shift: 3.0
  weighting: none
  guidance: 1.0
  caption_dropout: 0.05
  prior_weight: 1.0
  ema: null
  dtype: bfloat16
memory: {budget: auto, bits: auto, stream: auto}
validation: {fraction: 0.0, every: 100}
save: {every: 250, keep: 4, dtype: bfloat16}
previews: {every: 250, prompts: [], size: [512, 512], steps: 28, guidance: 4.0, seed: 42}
log: {tensorboard: false}
"""
STARTING_POINTS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALLEST = "model: {path: model}\ndata: {path: data/fox}\n"


@pytest.fixture
def load(tmp_path: Path):
    def write_and_load(text: str, *overrides: str) -> Config:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return load_config(tmp_path / "c.yaml", overrides)

    return write_and_load


@pytest.fixture
def refusal(load, tmp_path: Path):
    def messages(text: str, *overrides: str) -> list[str]:
        with pytest.raises(InputError) as raised:
            load(text, *overrides)
        return str(raised.value).replace(f"{tmp_path}/", "").splitlines()

    return messages


def section_type(name: str) -> type:
    kind = get_type_hints(Config)[name]
    return kind.__args__[0] if get_origin(kind) is tuple else kind


def leaves() -> list[tuple[str, "dataclasses.Field[Any]"]]:
    return [(section, field) for section in KEYS for field in dataclasses.fields(section_type(section))]


def test_every_documented_section_and_key_is_there() -> None:
    assert {field.name for field in dataclasses.fields(Config)} == {*KEYS, "sweep"}  # whose keys are those of others
    for section, keys in KEYS.items():
        assert {field.name for field in dataclasses.fields(section_type(section))} >= set(keys.split()), section


def test_what_is_left_out_is_the_documented_default(load) -> None:
    assert load(SMALLEST) == load(DEFAULTS)


@pytest.mark.parametrize("path", STARTING_POINTS, ids=lambda path: path.name)
def test_every_starting_point_loads(path: Path) -> None:
    assert load_config(path).data


def test_every_key_has_a_sentence_under_it() -> None:
    for section in KEYS:
        kind = section_type(section)
        source = Path(__import__(kind.__module__, fromlist=["x"]).__file__).read_text(encoding="utf-8")
        body = source.split(f"class {kind.__name__}", 1)[1].split("\nclass ", 1)[0]
        for field in dataclasses.fields(kind):
            after = body.split(f"\n    {field.name}:", 1)[1]
            before_next = after.split('"""', 2)
            assert before_next[1].strip().endswith((".", ")")), f"{section}.{field.name}"
            assert "\n    def " not in before_next[0], f"{section}.{field.name}"


def test_the_defaults_obey_their_own_limits(load) -> None:
    config = load(SMALLEST)
    assert load(dump_config(config)) == config


def test_a_dump_loads_to_an_equal_config(load) -> None:
    config = load(
        SMALLEST,
        "lora.targets=[attn.*]",
        "lora.ranks={'single_*': 4}",
        "lora.alpha=1e-3",
        "train.lr=3e-5",
        "model.vae='null'",
        "run.name='0123'",
        "memory.bits=8",
        "previews.prompts=[a fox, {prompt: 'two: foxes', size: [64, 128], seed: 7, negative: ''}]",
    )
    assert load(dump_config(config)) == config
    assert config.previews.prompts[1] == PromptOptions(prompt="two: foxes", size=(64, 128), seed=7, negative="")


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXT, max_size=3),
    path=TEXT,
    ranks=st.dictionaries(TEXT, st.integers(1, 999), max_size=3),
    lr=st.floats(0, 1e6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_text_and_number_survives_a_dump(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    path: str,
    ranks: dict[str, int],
    lr: float,
    seed: int,
) -> None:
    config = Config(model=ModelOptions(path=path), run=RunOptions(seed=seed))
    config = dataclasses.replace(
        config,
        previews=PreviewOptions(prompts=tuple(texts)),
        lora=dataclasses.replace(config.lora, ranks=ranks, targets=tuple(texts) or "blocks"),
        train=dataclasses.replace(config.train, lr=lr),
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_a_dump_is_plain_yaml_with_every_key(load) -> None:
    plain = yaml.safe_load(dump_config(load(SMALLEST)))
    assert {section: set(keys) for section, keys in plain.items() if section not in ("data", "sweep")} == {
        section: {field.name for field in dataclasses.fields(section_type(section))}
        for section in KEYS
        if section != "data"
    }


def test_messages_have_file_line_key_and_nearest_name(refusal) -> None:
    assert refusal("model: {path: m}\nlora:\n  rnak: 8\n") == [
        "c.yaml:3: unknown key 'lora.rnak'; did you mean 'lora.rank'?"
    ]
    assert refusal("model: {path: m}\ntrain: {lr: fast}") == ["c.yaml:2: 'train.lr' must be a number, found 'fast'"]


def test_a_key_in_the_wrong_section_is_shown_the_right_one(refusal) -> None:
    assert refusal("model: {path: m}\nlora: {lr: 1}\nrank: 4\ncaptions: lines") == [
        "c.yaml:2: unknown key 'lora.lr'; did you mean 'train.lr'?",
        "c.yaml:3: unknown key 'rank'; did you mean 'lora.rank'?",
        "c.yaml:4: unknown key 'captions'; did you mean 'data.captions'?",
    ]


def test_all_faults_of_file_and_overrides_at_once(refusal) -> None:
    assert refusal("run: {seed: -1}\nmodle: {path: m}\n", "train.lr=fast", "lora") == [
        "--set lora: write it as key.path=value, for example --set lora.rank=8",
        "c.yaml:1: 'run.seed' must be at least 0, found -1",
        "c.yaml:2: unknown key 'modle'; did you mean 'model'?",
        "--set train.lr=fast: 'train.lr' must be a number, found 'fast'",
        "c.yaml:1: 'model.path' is missing",
    ]


def test_an_empty_file_lacks_the_model(refusal) -> None:
    assert refusal("") == ["c.yaml:1: 'model.path' is missing"]
    assert refusal("# nothing\n") == ["c.yaml:1: 'model.path' is missing"]


def test_overrides_win_over_the_file_and_the_last_over_the_first(load) -> None:
    config = load(SMALLEST, "lora.rank=4", "lora.rank=8", "data.path=other", "train.lr=2e-4")
    assert (config.lora.rank, config.data[0].path, config.train.lr) == (8, "other", 2e-4)


def test_data_is_one_mapping_or_a_list(load, refusal) -> None:
    assert [data.path for data in load("model: {path: m}\ndata: [{path: a}, {path: b}]").data] == ["a", "b"]
    assert len(load(SMALLEST).data) == 1
    assert refusal("model: {path: m}\ndata:\n- path: a\n- repeats: 2\n") == ["c.yaml:4: 'data.1.path' is missing"]


@pytest.mark.parametrize(
    "assignment",
    [
        "run.seed=4294967296",
        "run.name=a/b",
        "run.name=..",
        "run.name=''",
        "model.name=klein",
        "encode.bits=5",
        "encode.batch_tokens=0",
        "cache.dtype=float16",
        "cache.codec=gzip",
        "lora.rank=0",
        "lora.kind=loha",
        "lora.factor=0",
        "lora.alpha=0",
        "lora.targets=[]",
        "lora.targets=attn",
        "lora.ranks={a: 0}",
        "train.steps=0",
        "train.batch=1.5",
        "train.accumulate=0",
        "train.lr=-1",
        "train.lr=.nan",
        "train.schedule=step",
        "train.betas=[0.9]",
        "train.betas=[0.9, 1.0]",
        "train.eps=0",
        "train.clip=-1",
        "train.sigma=cosine",
        "train.caption_dropout=1.1",
        "train.dtype=float16",
        "memory.bits=3",
        "save.every=0",
        "save.keep=0",
        "save.dtype=int8",
        "previews.size=[500, 512]",
        "previews.size=[512]",
        "previews.steps=0",
        "previews.prompts=[{size: [512, 512]}]",
        "previews.prompts=a fox",
        "previews.seed=-1",
    ],
)
def test_values_out_of_range_name_their_key(refusal, assignment: str) -> None:
    (message,) = refusal(SMALLEST, assignment)
    assert message.startswith(f"--set {assignment}: ")
    assert assignment.partition("=")[0].rpartition(".")[2] in message


def test_previews_fill_in_what_a_prompt_leaves_out(load) -> None:
    config = load(SMALLEST, "previews.prompts=[a, {prompt: b, steps: 4, guidance: 0}]", "previews.seed=7")
    first, second = config.previews.pictures()
    assert first == PromptOptions(prompt="a", size=(512, 512), seed=7, steps=28, guidance=4.0)
    assert second == PromptOptions(prompt="b", size=(512, 512), seed=7, steps=4, guidance=0.0)


def test_the_run_folder_expands_home(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(SMALLEST, "run.dir='~/runs'", "run.name=fox").run.folder == tmp_path / "runs" / "fox"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the config: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read the config"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: f\xfcchse}")
    with pytest.raises(InputError, match="UTF-8; byte 13 is not"):
        load_config(tmp_path / "latin.yaml")
