"""The golden fixtures of `tests/golden`: where they are, and how their arrays are kept."""

from pathlib import Path

import numpy as np
from safetensors import safe_open
from tiny.cases import Case, from_flat

HERE = Path(__file__).resolve().parent.parent / "golden"


class Golden:
    """One tiny checkpoint and what the reference makes of it."""

    def __init__(self, name: str, root: Path = HERE):
        """Read `root/NAME.safetensors`; the checkpoint beside it is `folder`."""
        self.name, self.folder = name, root / name
        with safe_open(root / f"{name}.safetensors", framework="numpy") as file:
            self.metadata: dict[str, str] = file.metadata()
            self.arrays: dict[str, np.ndarray] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays below `prefix`, by the rest of their names."""
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    def children(self, prefix: str) -> list[str]:
        """The names one level below `prefix`."""
        return sorted({key.split("/")[0] for key in self.under(prefix)})

    def case(self, prefix: str) -> Case:
        """The transformer's inputs below `prefix`."""
        return from_flat(self.under(prefix))


def pack_context(rows: np.ndarray) -> np.ndarray:
    """A context [T, C] with the equal rows in front (dev's pads) kept once, and not a bit lost."""
    same = (rows == rows[0]).all(axis=1)
    count = len(rows) if same.all() else int(np.argmin(same))
    return np.ascontiguousarray(rows[count - 1 :])


def unpack_context(packed: np.ndarray, length: int) -> np.ndarray:
    """The context [T, C] of `length` rows."""
    return np.concatenate([np.repeat(packed[:1], length - len(packed), axis=0), packed])
