"""Which store a command of `relay cache` is about."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flux2_relay.cache import Store
    from flux2_relay.pipeline.config import Config


@dataclass(frozen=True, slots=True)
class Where:
    """How the user named a store: by a config, by its path or URL, or both (then the config says what it is for)."""

    config_file: Path | None
    settings: tuple[str, ...]
    store: str | None

    def open(self, mode: Literal["r", "a"] = "r") -> "tuple[Store, Config | None]":
        """The store, and the config if there is one."""
        from flux2_relay import cache
        from flux2_relay.pipeline.config import load_config

        config = None if self.config_file is None else load_config(self.config_file, self.settings)
        path = config.cache.path if self.store is None and config is not None else self.store
        assert path is not None  # the command line has seen to it
        return cache.open(path, mode), config
