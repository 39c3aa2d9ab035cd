"""Repositories in the local Hugging Face cache: found by id, offline; nothing is ever downloaded."""

import os
import re
from pathlib import Path

_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_id(text: str) -> bool:
    """Whether a text may be a repository id, `owner/name`."""
    return _ID.fullmatch(text) is not None and not text.startswith((".", "~"))


def cache_folder() -> Path:
    """Where Hugging Face's tools keep their downloads on this machine."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = os.environ.get("HF_HOME")
    return (Path(home) if home else caches / "huggingface").expanduser() / "hub"


def snapshot(repository: str) -> Path | None:
    """The folder of a repository's newest download (its `main`), None where there is none.

    A download of one pinned revision leaves no `refs/main`; where it is the only one, it is meant.
    """
    folder = cache_folder() / f"models--{repository.replace('/', '--')}"
    snapshots = folder / "snapshots"
    try:
        revision = (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        revision = ""
    if revision and (snapshots / revision).is_dir():
        return snapshots / revision
    found = [path for path in snapshots.glob("*") if path.is_dir()]
    return found[0] if len(found) == 1 else None
