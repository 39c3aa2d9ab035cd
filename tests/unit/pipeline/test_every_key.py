"""Every key that training obeys changes what it should: two short runs, one with the key changed.

That numbers are right is tested where they are made; here, that no key is accepted and then forgotten on the way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny.project import Project

from flux2_relay.pipeline.config import flat, load_config

Changes = Mapping[str, Mapping[str, object]]
Check = Callable[[Project, Project], bool]
STEPS = ["000001", "000002", "000003"]
SECTIONS = ("lora", "train", "memory", "save", "validation", "previews", "log")
BASE = {
    "train": {"steps": 3, "caption_dropout": 0.0, "lr": 0.01},
    "lora": {"rank": 2, "targets": "attention"},
    "save": {"every": 1, "keep": 9, "dtype": "float32"},
    "previews": {"every": 0, "prompts": ["a blue dog"], "size": [64, 64], "steps": 2},
}
DRAWN = {"previews": {"every": 3}}


@dataclass(frozen=True)
class Key:
    """A changed value, what must hold of the run without and the run with it, and what both have besides."""

    value: object
    holds: Check
    both: Changes = field(default_factory=dict)


def merged(*changes: Changes) -> dict[str, dict[str, object]]:
    sections: dict[str, dict[str, object]] = {}
    for one in changes:
        for section, keys in one.items():
            sections[section] = {**sections.get(section, {}), **keys}
    return sections


def column(project: Project, key: str) -> list:
    return [value for (value,) in project.metrics(key)]


def tensors(project: Project, name: str = "adapter.safetensors") -> dict[str, np.ndarray]:
    values = mx.load(str(project.run / name))
    assert isinstance(values, dict)
    return {key: np.array(value.astype(mx.float32)) for key, value in values.items()}


def names(project: Project, folder: str) -> list[str]:
    return sorted(path.name for path in (project.run / folder).glob("[0-9]*"))


def same(before: Project, after: Project, key: str) -> bool:
    return column(before, key) == column(after, key)


def another_adapter(before: Project, after: Project) -> bool:
    """The same first step, another adapter after the last."""
    one, other = tensors(before), tensors(after)
    moved = [not np.allclose(one[name], other[name], rtol=1e-4, atol=1e-9) for name in one]
    return any(moved) and column(before, "loss")[0] == column(after, "loss")[0]


def another_loss(before: Project, after: Project) -> bool:
    """At the very first step, on the same noise levels."""
    first, second = column(before, "loss")[0], column(after, "loss")[0]
    return same(before, after, "sigma") and abs(first / second - 1) > 1e-5


def first_norm_times(factor: float) -> Check:
    return lambda before, after: abs(column(after, "grad_norm")[0] / column(before, "grad_norm")[0] / factor - 1) < 1e-4


def ranks(project: Project) -> dict[str, int]:
    return {name: value.shape[0] for name, value in tensors(project).items() if "lora_A" in name}


def lines_of(project: Project, part: str) -> int:
    return sum(part in name for name in tensors(project))


def sides(project: Project) -> set[int]:
    """Of the small matrices of LoKr."""
    return {side for name, value in tensors(project).items() if name.endswith("lokr_w1") for side in value.shape}


def moments(project: Project) -> float:
    found = tensors(project, "checkpoints/000001/optimizer.safetensors")
    return float(np.sqrt(sum((value**2).sum() for name, value in found.items() if name.endswith("|m"))))


def preview(project: Project, index: int = 0) -> np.ndarray:
    return tensors(project, f"previews/000003-{index:02d}.safetensors")["latents"]


def another_preview(before: Project, after: Project) -> bool:
    return preview(before).shape == preview(after).shape and np.abs(preview(before) - preview(after)).max() > 1e-3


def lines(project: Project, name: str) -> int:
    file = project.run / name
    return len(file.read_text().splitlines()) if file.exists() else 0


def log(project: Project) -> str:
    return (project.run / "log.txt").read_text()


def streamed(project: Project) -> bool:
    assert ("all blocks resident" in log(project)) != ("blocks resident" in log(project).replace("all blocks", ""))
    return "all blocks resident" not in log(project)


def saved_as(project: Project) -> set[mx.Dtype]:
    values = mx.load(str(project.run / "adapter.safetensors"))
    assert isinstance(values, dict)
    return {value.dtype for value in values.values()}


def has_modules(project: Project, part: str) -> bool:
    return any(part in name for name in tensors(project))


def first_rates(before: Project, after: Project) -> list[float]:
    return [b / a for a, b in zip(column(before, "lr"), column(after, "lr"), strict=True)]


KEYS = {
    "lora.rank": Key(3, lambda a, b: set(ranks(a).values()) == {2} and set(ranks(b).values()) == {3}),
    "lora.alpha": Key(32.0, first_norm_times(2.0)),
    "lora.kind": Key("dora", lambda a, b: [lines_of(p, "dora_scale") for p in (a, b)] == [0, 12]),
    "lora.factor": Key(4, lambda a, b: sides(a) == {8} and sides(b) == {4}, {"lora": {"kind": "lokr", "factor": 8}}),
    "lora.targets": Key(["to_q"], lambda a, b: has_modules(a, "to_k") and not has_modules(b, "to_k")),
    "lora.exclude": Key(["to_k"], lambda a, b: has_modules(a, "to_k") and not has_modules(b, "to_k")),
    "lora.ranks": Key({"to_k": 3}, lambda a, b: {3} == set(ranks(b).values()) - set(ranks(a).values())),
    "lora.dropout": Key(
        0.5, lambda a, b: column(a, "loss")[0] == column(b, "loss")[0] and not first_norm_times(1.0)(a, b)
    ),
    "lora.init": Key("INIT", another_loss),
    "train.steps": Key(5, lambda a, b: (len(column(a, "step")), len(column(b, "step"))) == (3, 5)),
    "train.batch": Key(3, lambda a, b: (len(column(a, "sigma")[0]), len(column(b, "sigma")[0])) == (2, 3)),
    "train.accumulate": Key(2, lambda a, b: (len(column(a, "sigma")[0]), len(column(b, "sigma")[0])) == (2, 4)),
    "train.lr": Key(0.02, lambda a, b: first_rates(a, b) == [2, 2, 2] and another_adapter(a, b)),
    "train.schedule": Key("linear", lambda a, b: np.allclose(first_rates(a, b), [1, 2 / 3, 1 / 3])),
    "train.warmup": Key(2, lambda a, b: first_rates(a, b) == [0.5, 1, 1] and another_adapter(a, b)),
    "train.optimizer": Key("lion", another_adapter),
    "train.betas": Key([0.5, 0.6], another_adapter),
    "train.eps": Key(1e-2, another_adapter),
    "train.weight_decay": Key(0.5, another_adapter),
    "train.clip": Key(1e-3, lambda a, b: abs(moments(b) / 1e-4 - 1) < 0.01 and moments(a) > 2e-4),
    "train.sigma": Key("uniform", lambda a, b: not same(a, b, "sigma")),
    "train.sigma_shift": Key(9.0, lambda a, b: column(b, "sigma") > column(a, "sigma"), {"train": {"sigma": "shift"}}),
    "train.weighting": Key("bell", another_loss),
    "train.guidance": Key(4.0, another_loss),
    "train.caption_dropout": Key(1.0, another_loss),
    "train.prior_weight": Key(
        0.5, lambda a, b: np.allclose(column(b, "loss")[0], 0.5 * column(a, "loss")[0]), {"data": {"prior": True}}
    ),
    "train.ema": Key(0.9, lambda a, b: [(p.run / "adapter_ema.safetensors").exists() for p in (a, b)] == [0, 1]),
    "train.dtype": Key("bfloat16", another_loss),
    "memory.budget": Key(3_000_000, lambda a, b: (streamed(a), streamed(b)) == (False, True)),
    "memory.bits": Key(
        8, lambda a, b: another_loss(a, b) and (" 8 bit" in log(b), " 8 bit" in log(a)) == (True, False)
    ),
    "memory.stream": Key(
        "always",
        lambda a, b: (streamed(a), streamed(b)) == (False, True) and same(a, b, "loss"),
    ),
    "memory.copy": Key(
        "COPY", lambda a, b: len(list((b.folder.parent / "copy").iterdir())) == 4, {"memory": {"bits": 8}}
    ),
    "save.every": Key(2, lambda a, b: [names(p, "checkpoints") for p in (a, b)] == [STEPS, STEPS[1:]]),
    "save.keep": Key(1, lambda a, b: (len(names(a, "checkpoints")), len(names(b, "checkpoints"))) == (3, 1)),
    "save.dtype": Key("float16", lambda a, b: (saved_as(a), saved_as(b)) == ({mx.float32}, {mx.float16})),
    "validation.fraction": Key(
        0.2, lambda a, b: (lines(a, "validation.jsonl"), lines(b, "validation.jsonl")) == (0, 2)
    ),
    "validation.every": Key(
        1,
        lambda a, b: (lines(a, "validation.jsonl"), lines(b, "validation.jsonl")) == (2, 4),
        {"validation": {"fraction": 0.2}},
    ),
    "previews.every": Key(2, lambda a, b: (len(names(a, "previews")), len(names(b, "previews"))) == (0, 3)),
    "previews.prompts": Key(
        ["a red fox", {"prompt": "a blue dog", "seed": 5, "size": [32, 64]}],
        lambda a, b: another_preview(a, b) and preview(b, 1).shape == (4, 2, 128),
        DRAWN,
    ),
    "previews.size": Key(
        [32, 96], lambda a, b: (preview(a).shape, preview(b).shape) == ((4, 4, 128), (6, 2, 128)), DRAWN
    ),
    "previews.steps": Key(3, another_preview, DRAWN),
    "previews.guidance": Key(1.0, another_preview, DRAWN),
    "previews.seed": Key(1, another_preview, DRAWN),
    "log.tensorboard": Key(True, lambda a, b: [(p.run / "tensorboard").exists() for p in (a, b)] == [False, True]),
}
ENCODED_ANEW = ("train.prior_weight", "previews.prompts")  # their set is another one


def test_no_key_is_missing_here(dev: Path, pictures: Path, tmp_path: Path) -> None:
    config = load_config(Project(tmp_path, dev, pictures).write().config)
    expected = {key for key in flat(config) if key.split(".")[0] in SECTIONS}
    assert set(KEYS) == expected


@pytest.fixture(scope="module")
def known() -> dict[str, Project]:
    """The runs without a change, by what they have besides."""
    return {}


@pytest.mark.parametrize("name", KEYS)
def test_the_key_changes_what_it_should(
    encoded: Callable[..., Project], known: dict, name: str, tmp_path: Path
) -> None:
    one, (section, key) = KEYS[name], name.split(".")
    before = known.get(repr(one.both)) or trained(encoded, merged(BASE, one.both), name in ENCODED_ANEW)
    known[repr(one.both)] = before
    assert flat(load_config(before.config))[name] != one.value
    value = str(before.run / "adapter.safetensors") if one.value == "INIT" else one.value
    value = str(tmp_path / "copy") if one.value == "COPY" else value
    after = trained(encoded, merged(BASE, one.both, {section: {key: value}}), name in ENCODED_ANEW)
    assert one.holds(before, after)


def trained(encoded: Callable[..., Project], changes: dict, encode: bool) -> Project:
    project = encoded(**changes)
    if encode:
        outcome = project.relay("encode")
        assert outcome.status == 0, outcome.said
    outcome = project.relay("train")
    assert outcome.status == 0, outcome.said
    return project
