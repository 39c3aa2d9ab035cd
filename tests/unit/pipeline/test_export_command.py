"""`relay export`: of a run, of a file, and what it refuses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import namings
from tiny.project import Outcome, Project, relay

from flux2_relay.stages.files import read_tensors
from flux2_relay.stages.spec import read_transformer_spec
from flux2_relay.stages.train import adapter_file, adapter_proof, checkpoint

CHANGES = {
    "train": {"steps": 4, "lr": 1e-2, "ema": 0.5},
    "lora": {"rank": 2, "alpha": 3.0, "ranks": {"to_k": 3}},
    "save": {"every": 2, "keep": 4, "dtype": "bfloat16"},
    "previews": {"every": 0},
    "validation": {"fraction": 0.4, "every": 2},
    "data": {"trigger": "zorp"},
}


@pytest.fixture(scope="module")
def trained(encoded_store: Path, dev: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of four steps with checkpoints at 2 and 4, a mean and a best; not to be written to."""
    project = Project(tmp_path_factory.mktemp("export") / "project", dev, pictures).write(CHANGES)
    shutil.copytree(encoded_store, project.store)
    mx.disable_compile()  # each compiled kernel costs half a second of C++ compiler on a CPU
    for command in ("encode", "train"):
        outcome = project.relay(command)
        assert outcome.status == 0, outcome.said
    mx.enable_compile()
    return project


def export(source: Path, out: Path, *arguments: object, form: str = "diffusers") -> Outcome:
    return relay("export", source, "--format", form, "-o", out, *arguments)


def assert_holds(file: Path, expected: Path, told_by: Path | None = None, limit: float = 1e-2) -> None:
    """`file` makes the updates that the checkpoint's file `expected` makes."""
    found, wanted = adapter_file.read_file(file), adapter_file.read_file(expected, told_by=told_by)
    assert found.factors.keys() == wanted.factors.keys()
    assert adapter_proof.largest(wanted.factors, found.factors).error <= limit


def names_of(step: int) -> str:
    return f"checkpoints/{step:06d}/adapter.safetensors"


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_the_newest_adapter_of_a_run(trained: Project, tmp_path: Path, form: str) -> None:
    out = tmp_path / "fox.safetensors"
    outcome = export(trained.run, out, form=form)
    assert outcome.status == 0, outcome.said
    assert "rank 2, 3, bfloat16" in outcome.said
    assert "read back and compared" in outcome.said
    assert_holds(out, trained.run / names_of(4))
    _, said = read_tensors(out)
    state = checkpoint.load_state(trained.run / "checkpoints/000004")
    expected = {"flux2_relay.set": state.set, "flux2_relay.steps": "4", "flux2_relay.trigger": "zorp"}
    expected |= {"flux2_relay.base": trained.model.name, "flux2_relay.rank": "2", "flux2_relay.alpha": "3.0"}
    expected |= {"modelspec.title": "tiny", "modelspec.resolution": "64x64", "modelspec.trigger_phrase": "zorp"}
    assert expected.items() <= said.items()
    assert len(said["flux2_relay.config"]) == 64
    assert {type(value) for value in said.values()} == {str}


def test_the_file_of_the_run_itself_is_such_a_file(trained: Project) -> None:
    assert_holds(trained.run / "adapter.safetensors", trained.run / names_of(4))
    _, said = read_tensors(trained.run / "adapter.safetensors")
    assert said["flux2_relay.steps"] == "4"
    assert said["modelspec.implementation"].endswith("/flux2")


@pytest.mark.parametrize(("dtype", "kind"), [("float32", mx.float32), ("fp16", mx.float16), ("bf16", mx.bfloat16)])
def test_the_type_is_chosen(trained: Project, tmp_path: Path, dtype: str, kind: mx.Dtype) -> None:
    out = tmp_path / "fox.safetensors"
    assert export(trained.run, out, "--dtype", dtype).status == 0
    assert {value.dtype for value in read_tensors(out)[0].values()} == {kind}
    assert_holds(out, trained.run / names_of(4), limit=1e-6 if dtype == "float32" else 1e-2)


def test_other_checkpoints_and_the_mean(trained: Project, tmp_path: Path) -> None:
    run, out = trained.run, tmp_path / "fox.safetensors"
    assert export(run, out, "--step", 2, "--dtype", "float32").status == 0
    assert_holds(out, run / names_of(2), limit=1e-6)
    assert read_tensors(out)[1]["flux2_relay.steps"] == "2"
    best = checkpoint.best(run / "checkpoints")
    assert best is not None
    assert export(run, out, "--best", "--dtype", "float32").status == 0
    assert_holds(out, best / "adapter.safetensors", limit=1e-6)
    assert export(run, out, "--ema", "--dtype", "float32").status == 0
    newest = run / "checkpoints/000004"
    assert_holds(out, newest / "ema.safetensors", newest / "adapter.safetensors", limit=1e-6)
    assert read_tensors(out)[1]["flux2_relay.ema"] == "0.5"
    assert not np.array_equal(out.read_bytes(), (run / "adapter.safetensors").read_bytes())


def test_a_damaged_checkpoint_is_passed_over_aloud(trained: Project, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    data = bytearray((run / names_of(4)).read_bytes())
    data[-1] ^= 1  # a number that is as good as another, but for its checksum
    (run / names_of(4)).write_bytes(data)
    out = tmp_path / "fox.safetensors"
    outcome = export(run, out)
    assert outcome.status == 0, outcome.said
    assert "going back to the checkpoint before it" in outcome.said
    assert_holds(out, run / names_of(2))
    asked = export(run, out, "--step", 4)
    assert asked.status == 2
    assert "000004" in asked.said
    shutil.rmtree(run / "checkpoints")
    assert export(run, out).status == 0
    assert_holds(out, run / "adapter.safetensors", limit=0)
    (run / "adapter.safetensors").unlink()
    assert export(run, out).status == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--step", 3), "no checkpoint of step 3; there are: 2, 4"),
        (("--best", "--step", 4), "--best or --step"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_what_a_run_has_not_is_refused(trained: Project, tmp_path: Path, arguments: tuple, sentence: str) -> None:
    outcome = export(trained.run, tmp_path / "fox.safetensors", *arguments)
    assert outcome.status == 2
    assert sentence in outcome.said
    assert not list(tmp_path.iterdir())


def test_runs_without_a_mean_or_a_best_say_so(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, load = Path(shutil.copytree(trained.run, tmp_path / "run")), checkpoint.load_state
    (run / "checkpoints/best").unlink()
    monkeypatch.setattr(checkpoint, "load_state", lambda place: replace(load(place), has_ema=False))
    for argument, key in (("--best", "validation.fraction"), ("--ema", "train.ema")):
        outcome = export(run, tmp_path / "fox.safetensors", argument)
        assert (outcome.status, key in outcome.said) == (2, True), outcome.said


# From a file


def other_file(dev: Path, path: Path, change: Callable[[namings.Pairs], namings.Pairs] = lambda of: of) -> Path:
    """As ai-toolkit or ComfyUI have it, in bfloat16."""
    spec = read_transformer_spec(dev / "transformer")
    naming = next(n for n in namings.NAMINGS if n.written == "comfyui")
    values, _ = namings.file_of(naming, change(namings.pairs(spec, outer=False)), 1.0)
    mx.save_safetensors(str(path), {n: v.astype(mx.bfloat16) for n, v in values.items()}, {"software": "other"})
    return path


@pytest.mark.parametrize("model", [False, True], ids=["alone", "with its model"])
def test_a_file_is_converted_between_tools_without_loss(dev: Path, tmp_path: Path, model: bool) -> None:
    source, config = other_file(dev, tmp_path / "other.safetensors"), Project(tmp_path / "p", dev, tmp_path).write()
    given = ["-c", config.config] if model else []
    for form in ("kohya", "diffusers", "comfyui"):
        out = tmp_path / f"{form}.safetensors"
        outcome = export(source, out, *given, form=form)
        assert outcome.status == 0, outcome.said
        assert_holds(out, source, limit=0)
        assert read_tensors(out)[1]["software"] == "other"
        source = out
    back, first = (read_tensors(p)[0] for p in (tmp_path / "comfyui.safetensors", tmp_path / "other.safetensors"))
    assert back.keys() == first.keys()
    assert all(mx.array_equal(back[name], first[name]) for name in first)


def test_an_adapter_that_changes_nothing_is_refused_unless_allowed(dev: Path, tmp_path: Path) -> None:
    source = other_file(
        dev, tmp_path / "o.safetensors", lambda of: {p: (a, mx.zeros_like(b)) for p, (a, b) in of.items()}
    )
    out = tmp_path / "fox.safetensors"
    outcome = export(source, out, form="kohya")
    assert outcome.status == 2
    assert "--allow-identity" in outcome.said
    assert not out.exists()
    assert export(source, out, "--allow-identity", form="kohya").status == 0
    assert len(adapter_file.read_file(out).factors) == len(adapter_file.read_file(source).factors)


def test_a_file_of_another_model_is_refused_where_the_model_is_named(klein: Path, dev: Path, tmp_path: Path) -> None:
    def deeper(of: namings.Pairs) -> namings.Pairs:
        return of | {path.replace("_blocks.1.", "_blocks.7."): pair for path, pair in of.items()}

    source, config = (
        other_file(dev, tmp_path / "o.safetensors", deeper),
        Project(tmp_path / "p", klein, tmp_path).write(),
    )
    assert export(source, tmp_path / "fox.safetensors").status == 0
    outcome = export(source, tmp_path / "fox.safetensors", "-c", config.config)
    assert outcome.status == 2
    assert "double_blocks.7.img_attn.proj.lora_A.weight: this model has no linear of that name" in outcome.said


def test_what_cannot_be_exported_is_said_in_a_sentence(dev: Path, tmp_path: Path) -> None:
    source, out = other_file(dev, tmp_path / "o.safetensors"), tmp_path / "fox.safetensors"
    (tmp_path / "folder").mkdir()
    for outcome, sentence in (
        (export(tmp_path / "none.safetensors", out), "no such file"),
        (export(tmp_path / "folder", out), "is no run folder"),
        (export(source, out, "--step", 2), "is a file"),
        (export(source, tmp_path / "fox.bin"), "ends in .safetensors"),
        (export(source, out, form="peft"), "peft"),
    ):
        assert outcome.status == 2, outcome.said
        assert sentence in outcome.said


def test_notes_name_the_modules_that_others_do_not_read(dev: Path, tmp_path: Path) -> None:
    spec = read_transformer_spec(dev / "transformer")
    of = {path: pair for path, pair in namings.pairs(spec).items() if path in ("norm_out.linear", "proj_out")}
    values, _ = namings.file_of(namings.NAMINGS[0], of, 1.0)
    mx.save_safetensors(str(tmp_path / "o.safetensors"), values)
    outcome = export(tmp_path / "o.safetensors", tmp_path / "fox.safetensors", form="comfyui")
    assert outcome.status == 0
    assert [line for line in outcome.said.splitlines() if line.startswith("note: norm_out.linear: ")]
    assert "proj_out: " not in outcome.said
