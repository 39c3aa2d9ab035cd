"""Full size, measured: `python tests/bench/gpu/run.py` runs the cases of `cases.py` one after another.

Each case has a process and a time limit of its own; one that fails gives a line that says so, and the run goes on.
A case appends a line of JSON to `--output`, after one that names machine, versions and command; the table is printed at
the end, or made again from lines written before (`--table FILE`). `--tiny` shrinks the models for a CPU.
"""

import argparse
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[0] = str(TESTS)  # and not this folder, whose names are in a package

from bench.gpu import machine, parent, table  # noqa: E402
from bench.gpu.cases import CASES, Case, tiny  # noqa: E402

SLACK, LEAST = 3, 150
"""A case may take this many times what it is expected to, and so many seconds: the first one compiles all kernels."""
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}


def main() -> int:
    """Run what was asked for; 1 where a case failed."""
    arguments = _arguments()
    if arguments.child:
        return _child(arguments.child, arguments.tiny, arguments.files, arguments.limit)
    if arguments.list:
        print(table.listing(CASES.values()))
        return 0
    chosen = _chosen(arguments.case, arguments.skip)
    output = Path(arguments.output)
    if arguments.table:
        lines = [json.loads(line) for path in arguments.table for line in Path(path).read_text("utf-8").splitlines()]
        print(table.markdown(lines, CASES))
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [machine.describe(arguments.tiny)]
    _append(output, lines[0])
    with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=arguments.files) as folder:
        ends = time.monotonic() + arguments.seconds
        for number, case in enumerate(chosen):
            lines.append(_run(case, arguments.tiny, Path(folder), ends - time.monotonic()))
            _append(output, lines[-1])
            if case.files and all(other.files != case.files for other in chosen[number + 1 :]):
                shutil.rmtree(Path(folder) / case.files, ignore_errors=True)
    print(table.markdown(lines, CASES))
    return int(any("error" in line for line in lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help="a case by name, or a pattern such as dev-4bit-*")
    parser.add_argument("--skip", action="append", default=[], help="not these, named likewise")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a machine without a GPU")
    parser.add_argument("--output", default="bench-gpu.jsonl", help="a line of JSON a case is appended here")
    parser.add_argument("--files", default=None, help="where streamed weights are laid, up to 40 GB; a fast disk")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case that would end later")
    parser.add_argument("--list", action="store_true", help="print the cases and leave")
    parser.add_argument("--table", nargs="+", help="print the table of these files and leave")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _chosen(names: Sequence[str], skipped: Sequence[str]) -> list[Case]:
    """The cases of these names in their order; all where none is named."""

    def is_meant(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    unknown = [p for p in (*names, *skipped) if not any(is_meant(name, [p]) for name in CASES)]
    if unknown:
        sys.exit(f"no such case: {', '.join(unknown)}; --list shows all")
    wanted = [case for name, case in CASES.items() if not names or is_meant(name, names)]
    return [case for case in wanted if not is_meant(case.name, skipped)]


def _run(case: Case, is_tiny: bool, folder: Path, left: float) -> dict[str, Any]:
    """The line of one case, run in a process of its own."""
    line: dict[str, Any] = {"case": case.name}
    if left < case.expected_seconds:
        return line | {"error": "not begun: too little time was left"}
    print(f"{case.name} (about {case.expected_seconds:.0f} s) …", flush=True)
    command = [sys.executable, "-W", "ignore", __file__, "--child", case.name, "--files", str(folder)]
    command += ["--tiny"] if is_tiny else []
    started, limit = time.monotonic(), min(left, max(LEAST, SLACK * case.expected_seconds))
    command += ["--limit", f"{limit:.0f}"]
    try:
        environment = {**ENVIRONMENT, **os.environ, **parent.named()}
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
        line |= _said(done)
    except subprocess.TimeoutExpired as late:
        where = late.stderr.decode(errors="replace") if isinstance(late.stderr, bytes) else late.stderr or ""
        line |= {"error": f"not done after {limit:.0f} s", "trace": where[-3000:]}
    line["process_seconds"] = round(time.monotonic() - started, 1)
    print("  " + table.brief(line), flush=True)
    return line


def _said(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a child printed last, or how it ended."""
    last = done.stdout.strip().splitlines()[-1:]
    if last and last[0].startswith("{"):
        return json.loads(last[0])
    return {"error": f"ended with status {done.returncode}: {done.stderr.strip()[-1500:]}"}


def _child(name: str, is_tiny: bool, files: str, limit: float) -> int:
    """Run one case here and print its figures as JSON, also where it fails."""
    parent.end_with_parent()
    case = tiny(CASES[name]) if is_tiny else CASES[name]
    settings = {**case.settings, "files": str(Path(files) / case.files) if case.files else None}
    if limit > 2:  # where a case hangs, or is slow, is in the line of one that ran out of time
        faulthandler.dump_traceback_later(limit - 2)
    try:
        found = import_module(f"bench.gpu.{case.kind}").run(settings)
    except Exception as error:  # whatever it is, it is one line of the table
        found = {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-1500:]}
    print(json.dumps(found), flush=True)
    return 0


def _append(output: Path, line: dict[str, Any]) -> None:
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
