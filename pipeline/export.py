"""`relay export`: the adapter of a run, or any LoRA file, written for another program and compared with its source."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import card, run_folder
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.run_folder import RunFolder, say

if TYPE_CHECKING:
    from flux2_relay.stages.spec import TransformerSpec
    from flux2_relay.stages.train.adapter_file import AdapterFile
    from flux2_relay.stages.train.export import Base
    from flux2_relay.stages.weights import Tensors

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}
"""What `--dtype` takes -> the type's whole name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which adapter of a run, and how it is written."""

    step: int | None = None
    """That of the checkpoint of this step; None takes the newest."""
    best: bool = False
    """That with the least held-out loss."""
    ema: bool = False
    """The running mean instead of the last values."""
    dtype: str | None = None
    """The type of the factors, of `DTYPES`; None keeps that of the file, or takes the run's `save.dtype`."""
    allow_identity: bool = False
    """Whether an adapter that changes nothing may be written."""

    @property
    def is_of_a_run(self) -> bool:
        """Whether it asks for something that a file cannot give."""
        return self.step is not None or self.best or self.ema


def export(source: Path, form_name: str, out: Path, choice: Choice, config: Config | None = None) -> None:
    """Write the adapter of `source`, a run folder or a file, to `out`; `config` names the model that a file is for."""
    from flux2_relay.stages.train import adapter_formats, adapter_proof
    from flux2_relay.stages.train.export import DTYPES as TYPES
    from flux2_relay.stages.train.export import suited, write

    if out.suffix != ".safetensors":
        raise InputError(f"-o {out}: other programs look for a name that ends in .safetensors")
    adapter = _of_run(source, choice) if source.is_dir() else _of_file(source, choice, config)
    if adapter_proof.is_zero(adapter.factors) and not choice.allow_identity:
        raise InputError(
            f"{source}: a factor of every module is zero, so it changes nothing (an untrained adapter?); "
            "--allow-identity writes it all the same"
        )
    form = adapter_formats.FORMATS[form_name]
    adapter_formats.refuse(form, adapter.factors, adapter.spec)
    config = run_folder.open_run(source)[1] if source.is_dir() else config
    factors = suited(adapter.factors, form, _base(config) if config else None)
    dtype = TYPES[DTYPES[choice.dtype]] if choice.dtype else adapter.dtype
    difference = write(out, factors, adapter.spec, form, adapter.metadata, dtype)
    ranks = ", ".join(map(str, sorted({part.rank for part in adapter.factors.values() if part.rank}))) or "none"
    kind = next(name for name, known in TYPES.items() if known == dtype)
    say(f"{out}: {len(adapter.factors)} modules, rank {ranks}, {kind}, {form.name} names: for {form.readers}")
    say(
        "read back and compared: no module's update differs by more than "
        f"{difference.error:.1e} of its norm ({difference.module})"
    )
    for remark in adapter_formats.remarks(form, adapter.factors):
        say(f"note: {remark}")


def _of_file(path: Path, choice: Choice, config: Config | None) -> "AdapterFile":
    from flux2_relay.stages.train import adapter_file

    if choice.is_of_a_run:
        raise InputError(f"{path} is a file; --step, --best and --ema choose among the checkpoints of a run folder")
    return adapter_file.read_file(path, None if config is None else _spec(config))


def _base(config: Config) -> "Base":
    """The rows of the base model that the config names."""
    import mlx.core as mx

    from flux2_relay.stages import folders
    from flux2_relay.stages.train import merge

    @cache
    def tensors() -> "Tensors":
        return merge.open_dense(folders.find(config.model.path).transformer, _spec(config))

    return lambda path: (rows.astype(mx.float32) for rows in merge.stretches(tensors(), f"{path}.weight"))


def _spec(config: Config) -> "TransformerSpec":
    from flux2_relay.stages import folders, spec

    return spec.read_transformer_spec(folders.find(config.model.path).transformer)


def _of_run(path: Path, choice: Choice) -> "AdapterFile":
    """The chosen adapter of a run, with what the run says of it."""
    from flux2_relay.stages.train import checkpoint

    run, config = run_folder.open_run(path)
    saved = checkpoint.saved(run.checkpoints)
    if choice.best:
        return _of_checkpoint(_best(run), config, choice.ema)
    if choice.step is not None:
        return _of_checkpoint(_of_step(run, saved, choice.step), config, choice.ema)
    for place in reversed(saved):
        try:
            return _of_checkpoint(place, config, choice.ema)
        except InputError as error:
            if place == saved[0]:
                raise
            say(f"{error}; going back to the checkpoint before it")
    return _finished(run, choice.ema)


def _best(run: RunFolder) -> Path:
    from flux2_relay.stages.train import checkpoint

    found = checkpoint.best(run.checkpoints)
    if found is None:
        raise InputError(f"{run.path}: no checkpoint is marked as the best; validation.fraction holds pictures out")
    return found


def _of_step(run: RunFolder, saved: list[Path], step: int) -> Path:
    found = next((place for place in saved if int(place.name) == step), None)
    if found is None:
        steps = ", ".join(str(int(place.name)) for place in saved) or "none"
        raise InputError(f"{run.path}: has no checkpoint of step {step}; there are: {steps}")
    return found


def _of_checkpoint(place: Path, config: Config, ema: bool) -> "AdapterFile":
    """The adapter of a checkpoint, or its mean, which is as strong."""
    from flux2_relay.stages.train import adapter_file, checkpoint
    from flux2_relay.stages.train.export import DTYPES as TYPES

    state = checkpoint.load_state(place)
    if ema and not state.has_ema:
        raise InputError(f"{place}: holds no running mean; `train.ema` asks for one")
    names = ("ema.safetensors", "adapter.safetensors") if ema else ("adapter.safetensors",)
    for name in names:
        checkpoint.check_sum(place, name)
    adapter = adapter_file.read_file(place / names[0], told_by=place / names[-1])
    said = {**card.of_run(config, state.set), "flux2_relay.steps": str(state.step)}
    said |= {"flux2_relay.ema": str(config.train.ema)} if ema else {}
    return replace(adapter, metadata=said, dtype=TYPES[config.save.dtype])


def _finished(run: RunFolder, ema: bool) -> "AdapterFile":
    """The adapter that a run left for other programs, where its checkpoints were removed."""
    from flux2_relay.stages.train import adapter_file

    file = run.adapter.with_stem("adapter_ema") if ema else run.adapter
    if not file.is_file():
        raise InputError(f"{run.path}: has neither checkpoints nor {file.name}; `relay train` makes them")
    return adapter_file.read_file(file)
