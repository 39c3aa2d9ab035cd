"""The bench for full-size models: its tiny form runs, its table judges, and both sides have the same sizes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.gpu import cases, parent, table

from flux2_relay.stages.catalogue import CATALOGUE, ENCODERS

GPU = Path(__file__).parents[1] / "bench" / "gpu"


def lines(tmp_path: Path, *names: str) -> dict[str, dict]:
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, GPU / "run.py", "--tiny", "--output", output, "--files", tmp_path]
    for name in names:
        command += ["--case", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert found[0]["tiny"]
    assert all(f"| {name} |" in done.stdout for name in names)
    return {line["case"]: line for line in found[1:]}


def test_a_resident_and_a_streamed_step_run_in_tiny(tmp_path: Path) -> None:
    found = lines(tmp_path, "dev-bf16-512", "dev-4bit-streamed-512")
    resident, streamed = found["dev-bf16-512"], found["dev-4bit-streamed-512"]
    assert resident["keep"] == resident["resident"] == 3
    assert streamed["resident"] == streamed["keep"] == 0
    assert streamed["loader_seconds"] > 0
    assert all(line["peak_gib"] > 0 and line["seconds"] > 0 and line["loss"] > 0 for line in found.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "lines.jsonl"], "weights are removed"


def test_runs_over_one_base_run_in_tiny(tmp_path: Path) -> None:
    name = "dev-4bit-512-sweep-streamed"
    found = lines(tmp_path, name)[name]
    assert found["resident"] == 0
    measured = ("seconds", "ratio", "predicted_gib", "peak_gib")
    assert min(of[figure] for of in (found, found["in_turns"]) for figure in measured) > 0
    assert found["alone_seconds"] > 0
    assert found["apart"] < 1e-3, "joined runs find what runs find that take turns, in bfloat16"


def test_two_ranks_end_with_the_adapter_of_one_that_accumulates(tmp_path: Path) -> None:
    """In tiny over ring, where that is so to the bit; on cards it is measured."""
    found = lines(tmp_path, "two-ranks-same")["two-ranks-same"]
    assert found["ratio"] == found["apart"] == 0


BLOCKED = """
import ctypes
from bench.gpu import parent
parent.end_with_parent()
print("begun", flush=True)
ctypes.PyDLL(None).sleep(60)  # holds Python's lock, as a rank does that waits for the others
"""
STARTER = """
import os, subprocess, sys
from bench.gpu import parent
subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, **parent.named()})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread watches, which such a call stops")
def test_a_process_that_is_blocked_does_not_outlive_the_one_that_started_it() -> None:
    environment = {**os.environ, "PYTHONPATH": str(GPU.parents[1])}
    command = [sys.executable, "-c", STARTER, BLOCKED]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "begun\n"
        starter.kill()
        assert starter.communicate(timeout=30)[0] == "", "the pipe ends when both have"


def test_a_process_whose_starter_is_gone_before_it_looks_leaves() -> None:
    environment = {**os.environ, **parent.named(), "PYTHONPATH": str(GPU.parents[1])}
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, BLOCKED], env=environment, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_a_case_that_fails_is_a_line_and_the_run_goes_on() -> None:
    case = cases.CASES["dev-bf16-512"]
    found = [{"case": "dev-4bit-512", "error": "no | memory"}, {"case": case.name, **FIGURES}]
    text = table.markdown(found, cases.CASES)
    assert "| dev-4bit-512 | | | | failed: no / memory | | |" in text
    assert "yes, 0.37 s" in text
    assert "**no**, 76 GiB" in text


FIGURES = {"seconds": 0.37, "peak_gib": 76.0, "predicted_gib": 72.0, "bits": 16, "resident": 56, "keep": 56}


@pytest.mark.parametrize(("seconds", "verdict"), [(0.67, "yes, 1.81 x"), (0.4, "**no**, 1.08 x")])
def test_a_peer_is_compared_with(seconds: float, verdict: str) -> None:
    found = [{"case": "dev-bf16-512", **FIGURES}, {"case": "peer-dev-512-checkpointed", "seconds": seconds, "how": ""}]
    assert verdict in table.markdown(found, cases.CASES)


def test_goals_name_cases() -> None:
    named = {other for case in cases.CASES.values() for other in (*case.goal.faster_than, *case.goal.slower_at_most)}
    assert named <= cases.CASES.keys()


def constant(file: str, name: str) -> dict:
    """A constant of a module that imports torch, which tests here may not."""
    for node in ast.walk(ast.parse((GPU / file).read_text("utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            assert node.value is not None
            return ast.literal_eval(node.value)
    raise LookupError(name)


@pytest.mark.parametrize("name", ["dev", "klein-9b", "klein-4b"])
def test_the_peer_has_the_sizes_of_the_catalogue(name: str) -> None:
    spec, theirs = CATALOGUE[name][0], constant("peer_model.py", "SIZES")[name]
    ours = (spec.double_blocks, spec.single_blocks, spec.heads, spec.context_width)
    assert ours == tuple(theirs.values())


def test_the_peers_encoder_has_the_sizes_of_the_catalogue() -> None:
    spec, theirs = ENCODERS["Mistral Small 3.2 24B"], constant("peer_encoder.py", "SIZES")
    ours = (spec.hidden, spec.mlp_width, spec.layers, spec.heads, spec.kv_heads, spec.head_dim)
    assert ours == tuple(theirs.values())
