"""The rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("cache", "configs", "pipeline", "stages")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

MAY_NOT_IMPORT = {
    "cache": ("stages", "pipeline", "configs"),
    "configs": ("stages", "pipeline", "cache"),
    "stages": ("pipeline", "configs"),
    "stages/encode": ("stages.train", "stages.decode"),
    "stages/train": ("stages.encode", "stages.decode"),
    "stages/decode": ("stages.encode", "stages.train"),
}
# No place here for a workplace or a package index; the brackets keep this line itself from matching.
FORBIDDEN = re.compile(r"/[w]ork/|py[p]i[.]org|python[h]osted|download[.]py[t]orch|--(extra-)?index-url", re.I)
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION = 400, 60, 12


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def name(path: object) -> str:
    return str(Path(str(path)).relative_to(ROOT)) if isinstance(path, Path) else str(path)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported, inside functions and for types too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


CODE = pytest.mark.parametrize("path", sources(*ROOMS), ids=name)
ALL = pytest.mark.parametrize("path", sources(*ROOMS, "tests", "examples"), ids=name)


@CODE
def test_rooms_import_downwards_only(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    forbidden = [f"flux2_relay.{b}" for a, below in MAY_NOT_IMPORT.items() if where.startswith(f"{a}/") for b in below]
    wrong = [(line, module) for line, module in imported(path) for f in forbidden if is_below(module, f)]
    assert not wrong


@ALL
def test_imports_are_absolute_and_say_flux2_relay(path: Path) -> None:
    wrong = [(line, m) for line, m in imported(path) if m.startswith(".") or m.split(".")[0] in ROOMS]
    assert not wrong


@CODE
def test_the_program_needs_no_torch(path: Path) -> None:
    heavy = ("torch", "diffusers", "transformers", "peft", "accelerate")
    assert not [(line, module) for line, module in imported(path) if module.split(".")[0] in heavy]


@pytest.mark.parametrize("path", sources("tests/unit", "tests/golden", "tests/faults"), ids=name)
def test_tests_without_torch_do_not_import_it(path: Path) -> None:
    if path.name.startswith("test_"):  # what makes the fixtures may
        assert not [line for line, module in imported(path) if module.split(".")[0] in ("torch", "diffusers")]


def test_the_package_list_is_the_folders() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in sources(*ROOMS)}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted("flux2_relay." + folder.replace("/", ".") for folder in folders)
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapping == {f"flux2_relay.{room}": room for room in ROOMS}


@CODE
def test_every_module_says_what_it_is(path: Path) -> None:
    said = ast.get_docstring(tree(path))
    assert said
    assert said.splitlines()[0].rstrip().endswith((".", ":", ")")), "the first line is one sentence"


@ALL
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def functions(path: Path) -> list[tuple[str, int]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    return [(f"{node.name}:{node.lineno}", (node.end_lineno or 0) - node.lineno + 1) for node in found]


@ALL
def test_functions_fit_on_a_screen(path: Path) -> None:
    assert not [(function, lines) for function, lines in functions(path) if lines > LONGEST_FUNCTION]


def test_most_functions_are_a_few_lines() -> None:
    lengths = sorted(lines for path in sources(*ROOMS) for _, lines in functions(path))
    assert lengths[len(lengths) // 2] <= MEDIAN_FUNCTION


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]


def test_nothing_names_a_workplace_or_an_index() -> None:
    suspects = [path for path in tracked() if path.stat().st_size < 2**20]
    texts = {name(path): path.read_bytes().decode("utf-8", "replace") for path in suspects}
    assert not {where: found[0] for where, text in texts.items() if (found := FORBIDDEN.search(text))}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"mlx", "mlx.core", "zarr", "numpy", "PIL", "tokenizers", "mlx_lm"}


def test_a_config_is_checked_without_anything_heavy() -> None:
    assert not modules_after("import flux2_relay.pipeline.config") & {"mlx", "mlx.core", "zarr", "mlx_lm"}


def test_nothing_brings_in_mlx_before_the_stages_do() -> None:
    """On a Linux CPU products are 40 times slower where MLX comes before the BLAS that `stages` loads."""
    first = [
        name(path) for path in sources("pipeline", "cache") if re.search(r"(?m)^(import|from) mlx", path.read_text())
    ]
    assert not first


@pytest.mark.skipif(not (ROOT / "pipeline" / "cli.py").exists(), reason="there is no command line yet")
def test_help_is_light() -> None:
    code = "from flux2_relay.pipeline.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not modules_after(code) & HEAVY


def test_ci_runs_what_contributing_promises() -> None:
    promised = re.findall(r"\| `make (\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    promised.remove("score")  # as CONTRIBUTING.md says
    assert f"make {' '.join(promised)}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_make_says_what_each_target_does() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    (phony,) = [line.removeprefix(".PHONY: ").split() for line in lines if line.startswith(".PHONY: help")]
    documented = [found[1] for line in lines if (found := re.match(r"([a-z-]+):.*## \S", line))]
    assert documented == phony


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60
