"""The config file: nests the options that each component declares, and holds the few that belong to none.

The schema is here and in the option records that `Config` names; the starting points are in `configs/`.
Relative paths in a config are relative to the working folder, not to the file; `~` is expanded at use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import schema
from flux2_relay.stages.encode.dataset import DataOptions
from flux2_relay.stages.encode.options import EncodeOptions
from flux2_relay.stages.train.options import (
    LogOptions,
    LoraOptions,
    MemoryOptions,
    PreviewOptions,
    SaveOptions,
    TrainOptions,
    ValidationOptions,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where a run is kept, and what makes it repeatable."""

    name: str = "run"
    """The run folder is `dir/name`."""

    dir: str = "runs"
    """The folder of all runs."""

    seed: int = field(default=0, metadata={"min": 0, "max": 2**32 - 1})
    """Everything random is a function of it, the step and the item."""

    def __post_init__(self) -> None:
        """Refuse a name that is no single folder name."""
        if self.name in ("", ".", "..") or any(character in self.name for character in "/\\\0"):
            raise ValueError(f"'name' must be the name of one folder, found {self.name!r}")

    @property
    def folder(self) -> Path:
        """The run folder, `~` expanded."""
        return Path(self.dir).expanduser() / self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which checkpoint is trained, and where its parts are."""

    path: str
    """A folder in the diffusers layout, a repository id in the local Hugging Face cache, or a single file."""

    name: Literal["auto", "dev", "klein-4b", "klein-9b", "klein-base-4b", "klein-base-9b"] = "auto"
    """What the checkpoint must be; `auto` takes what it says of itself."""

    text_encoder: str | None = None
    """Another folder, file or repository for the text encoder, e.g. an MLX-quantized one."""

    tokenizer: str | None = None
    """Another folder or repository for the tokenizer."""

    vae: str | None = None
    """Another folder, file or repository for the VAE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """The store where the stages meet."""

    path: str = "store.zarr"
    """Folder of the store."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of stored text rows."""

    latents_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of stored latents."""

    codec: Literal["zstd", "none"] = "zstd"
    """Compression of the chunks."""


Varied = str | None | tuple[str, ...]
"""One value of a swept key, as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One config file, a field for each section."""

    run: RunOptions = field(default_factory=RunOptions)
    model: ModelOptions
    data: tuple[DataOptions, ...] = ()
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    previews: PreviewOptions = field(default_factory=PreviewOptions)
    log: LogOptions = field(default_factory=LogOptions)

    sweep: Mapping[str, tuple[Varied, ...]] = field(default_factory=dict)
    """Keys with the values that they take in turn, as in `lora.rank: [8, 16]`: `relay train` trains a run for every
    combination, all together over one base."""

    def __post_init__(self) -> None:
        """Refuse a sweep of nothing, or of sweeps."""
        for key, values in self.sweep.items():
            if not values or key.partition(".")[0] == "sweep":
                raise ValueError(f"'sweep.{key}' must name a key of another section and the values that it takes")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in the file at `path`, after each `key.path=value` of `overrides`, the last one winning.

    Raises InputError with every fault of the file and of the overrides, a line each.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a config must be text in UTF-8; byte {error.start} is not") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read the config: {error.strerror or error}") from error
    root = schema.compose(text, str(path)) or schema.empty(str(path))
    faults = []
    for assignment in overrides:
        try:
            root = schema.override(root, assignment)
        except InputError as error:
            faults.append(str(error))
    try:
        config = schema.build(root, Config)
    except InputError as error:
        raise InputError("\n".join([*faults, str(error)])) from None
    if faults:
        raise InputError("\n".join(faults))
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every key written out; it loads to an equal `Config`."""
    return yaml.safe_dump(schema.plain(config), sort_keys=False, allow_unicode=True, width=100)


def flat(config: Config) -> dict[str, object]:
    """Every key of every section as `section.key` with its plain value; the list of data folders is one value."""
    sections = schema.plain(config)
    assert isinstance(sections, dict)
    values: dict[str, object] = {}
    for name, section in sections.items():
        values |= {f"{name}.{key}": v for key, v in section.items()} if isinstance(section, dict) else {name: section}
    return values
