"""Files in the run folder by which a user asks a run for something: `.save` a checkpoint, `.stop` to leave with one."""

from pathlib import Path

SAVE, STOP = ".save", ".stop"


def is_asked(folder: Path, wish: str) -> bool:
    """Whether the file is there; it is taken away, so that it is obeyed once."""
    try:
        (folder / wish).unlink()
    except FileNotFoundError:
        return False
    return True
