"""On what, with what, by which command: the first line of a run's figures."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = "mlx", "mlx-cuda-13", "mlx-cuda-12", "mlx-cpu", "mlx-lm", "torch", "diffusers", "transformers", "peft"


def describe(is_tiny: bool) -> dict[str, Any]:
    """Machine, versions, commit, command and time."""
    return {
        "machine": _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
        or platform.processor()
        or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": os.environ.get("COMMIT") or _said("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiny": is_tiny,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
