"""Stage two: the transformer and its LoRA, from the store alone.

One step: read the batches, predict, compare, update; every so often a checkpoint, and previews as latents (the VAE is
another process). `train` needs a `Job` and tells a `Journal` what happens; it knows no config file.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import mlx.core as mx
from tqdm import tqdm

from flux2_relay.cache import Store
from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.cache.sets import SetRecord
from flux2_relay.stages.files import write_tensors
from flux2_relay.stages.folders import ModelFolders
from flux2_relay.stages.measure import peak_bytes
from flux2_relay.stages.one_model import in_turn, say_loaded
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import checkpoint, lora, objective, optimizer
from flux2_relay.stages.train.backprop import loss_and_gradients
from flux2_relay.stages.train.batches import Batches, Draw, Loaded, load_ahead
from flux2_relay.stages.train.contexts import Contexts, open_contexts
from flux2_relay.stages.train.export import DTYPES, write_diffusers
from flux2_relay.stages.train.objective import Batch
from flux2_relay.stages.train.options import LoraOptions, PreviewOptions, SaveOptions, TrainOptions
from flux2_relay.stages.train.sample import Picture, draw
from flux2_relay.stages.train.transformer import Transformer, load_transformer

_CACHE_BYTES = 1 << 30  # freed buffers kept for reuse; without a limit they grow with every new shape


class Journal(Protocol):
    """Where a run's lines go."""

    def write(self, line: Mapping[str, object]) -> None:
        """Add one step's metrics."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what was written of later steps than `step`."""
        ...

    def say(self, sentence: str) -> None:
        """Tell the user something that happens once."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to train, on what, and where to."""

    store: Store
    record: SetRecord
    folder: Path
    seed: int
    lora: LoraOptions
    train: TrainOptions
    save: SaveOptions
    previews: PreviewOptions
    distilled: bool
    metadata: Mapping[str, str]
    resume: bool
    max_steps: int | None  # stop after this many steps of this process
    stop: Callable[[], bool]  # asked after every step: leave now, with a checkpoint?


def run(job: Job, folders: ModelFolders, spec: TransformerSpec, bits: int, journal: Journal) -> int:
    """Load the transformer, train, and let go of it -> steps done."""
    return in_turn("transformer", partial(_load_and_train, job, folders, spec, bits, journal), journal.say)


def _load_and_train(job: Job, folders: ModelFolders, spec: TransformerSpec, bits: int, journal: Journal) -> int:
    dtype = mx.float32 if job.train.dtype == "float32" else mx.bfloat16
    transformer = load_transformer(folders.root, spec, bits, dtype)
    say_loaded(f"transformer ({spec.double_blocks} + {spec.single_blocks} blocks, {bits} bit)", journal.say)
    return train(job, transformer, journal)


def train(job: Job, transformer: Transformer, journal: Journal) -> int:
    """Train until `train.steps`, `max_steps` or `stop`, from the newest checkpoint where there is one -> steps done."""
    mx.set_cache_limit(_CACHE_BYTES)
    contexts = open_contexts(job.store, job.record.body, transformer.spec.context_width)
    batches = Batches(job.record.body, job.train, job.seed)
    run = _Run(job, transformer, journal, contexts)
    first = run.begin()
    last = job.train.steps if job.max_steps is None else min(job.train.steps, first + job.max_steps)
    bar = tqdm(total=job.train.steps, initial=first, desc="train", unit="step", dynamic_ncols=True)
    with bar:
        for loaded in load_ahead(batches, job.store, contexts, first, last):
            run.step(loaded, bar)
            if job.stop():
                break
    run.finish()
    return run.done


class _Run:
    """A run under way: the adapters and moments after `done` updates."""

    def __init__(self, job: Job, transformer: Transformer, journal: Journal, contexts: Contexts) -> None:
        self.job, self.transformer, self.journal, self.contexts = job, transformer, journal, contexts
        self.done = self.saved = 0
        lora.attach(transformer, job.lora, job.seed)
        self.optimizer = optimizer.Optimizer(job.train, lora.parameters(transformer))

    def begin(self) -> int:
        """Take up the newest whole checkpoint, and draw the previews of its step or of step 0 -> updates done."""
        found, complaints = checkpoint.latest(self._checkpoints) if self.job.resume else (None, [])
        for complaint in complaints:
            self.journal.say(complaint)
        if found is not None:
            self._take_up(found)
        self.journal.rewind(self.done)
        self._previews()
        return self.done

    def step(self, loaded: Loaded, bar: tqdm) -> None:
        """One update, its line in the journal, and what is due after it."""
        started = time.perf_counter()
        loss, gradients, sigmas = self._gradients(loaded)
        gradients, norm = optimizer.clip(gradients, self.job.train.clip)
        rate = optimizer.learning_rate(self.job.train, loaded.step)
        self._refuse_not_finite(loss, norm, loaded)
        lora.load(self.transformer, self.optimizer.update(lora.parameters(self.transformer), gradients, loaded.step))
        self.done = loaded.step + 1
        self.journal.write(
            {
                "step": self.done,
                "loss": loss.item(),
                "lr": rate,
                "grad_norm": norm.item(),
                "sigma": sigmas,
                "seconds": round(time.perf_counter() - started, 4),
                "wait_seconds": round(loaded.wait_seconds, 4),
                "peak_bytes": peak_bytes(),
            }
        )
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        bar.update()
        self._after_step()

    def finish(self) -> None:
        """A checkpoint of where the run stands, and the adapter once it is done."""
        if self.done != self.saved:
            self._save()
        write_diffusers(
            self.transformer,
            self.job.folder / "adapter.safetensors",
            {**self.job.metadata, "flux2_relay.steps": str(self.done)},
            DTYPES[self.job.save.dtype],
        )

    def _gradients(self, loaded: Loaded) -> tuple[mx.array, dict[str, mx.array], list[float]]:
        """Loss and gradients averaged over the step's passes, and the sigma of every item."""
        losses, sums, sigmas = [], {}, []
        for draws, batch in loaded.passes:
            of_pass = [self._draw(loaded.step, d, batch) for d in draws]
            sigma = mx.array([sigma for sigma, _ in of_pass], mx.float32)
            noise = mx.stack([noise for _, noise in of_pass])
            places = [drawn.place for drawn in draws]
            dropping = lora.with_dropout(self.transformer, self.job.lora.dropout, self.job.seed, loaded.step, places)
            loss, gradients = loss_and_gradients(
                dropping, batch, sigma, noise, self._guidance(len(draws)), self.job.train
            )
            sums = {name: sums[name] + value if sums else value for name, value in gradients.items()}
            mx.eval(loss, sums)
            losses.append(loss)
            sigmas += [sigma for sigma, _ in of_pass]
        count = len(loaded.passes)
        return mx.mean(mx.stack(losses)), {name: value / count for name, value in sums.items()}, sigmas

    def _draw(self, step: int, drawn: Draw, batch: Batch) -> tuple[float, mx.array]:
        return objective.draw(self.job.seed, step, drawn.place, batch.latents.shape[1:], self.job.train)

    def _guidance(self, items: int) -> mx.array | None:
        return mx.full((items,), self.job.train.guidance) if self.transformer.spec.guidance else None

    def _after_step(self) -> None:
        if self._is_due(self.job.save.every):
            self._save()
        self._previews()

    def _is_due(self, every: int) -> bool:
        return self.done == self.job.train.steps or self.done % every == 0

    def _refuse_not_finite(self, loss: mx.array, norm: mx.array, loaded: Loaded) -> None:
        if mx.isfinite(loss + norm).item():
            return
        names = ", ".join(sorted({drawn.item.id for draws, _ in loaded.passes for drawn in draws}))
        raise RelayError(
            f"step {loaded.step + 1}: loss {loss.item()}, norm of the gradient {norm.item()}; the batch was {names}. "
            f"The adapter was left as it was before the step; a lower train.lr is the usual remedy. "
            f"Start again to go on from the checkpoint of step {self.saved}."
        )

    @property
    def _checkpoints(self) -> Path:
        return self.job.folder / "checkpoints"

    def _save(self) -> None:
        state = checkpoint.State(step=self.done, seed=self.job.seed, set=self.job.record.key)
        adapter, moments = lora.parameters(self.transformer), self.optimizer.state()
        whole = checkpoint.Checkpoint(state=state, adapter=adapter, optimizer=moments)
        checkpoint.save(self._checkpoints, whole, self.job.save.keep)
        self.saved = self.done

    def _take_up(self, found: checkpoint.Checkpoint) -> None:
        for what, then, now in (
            ("run.seed", found.state.seed, self.job.seed),
            ("the data set (its set in the store)", found.state.set, self.job.record.key),
        ):
            if then != now:
                raise InputError(
                    f"{self.job.folder} cannot be resumed: {what} was {then} and is {now} now. "
                    "Go back to what it was, or start a new run under another run.name."
                )
        lora.load(self.transformer, found.adapter)
        self.optimizer.restore(found.optimizer)
        self.done = self.saved = found.state.step
        self.journal.say(f"going on from the checkpoint of step {self.done}")

    def _previews(self) -> None:
        """Draw the previews that are due at this step and not there yet, as latents."""
        if not self.job.previews.every or not self._is_due(self.job.previews.every):
            return
        prompts: Sequence[Mapping] = self.job.record.body["prompts"]
        for index, (options, keys) in enumerate(zip(self.job.previews.pictures(), prompts, strict=True)):
            path = self.job.folder / "previews" / f"{self.done:06d}-{index:02d}.safetensors"
            if path.exists() and self.done == self.saved:
                continue
            width, height = options.size or self.job.previews.size
            picture = Picture(
                context=self.contexts.context(keys["text"]),
                negative=None if self.job.distilled else self.contexts.context(keys["negative"]),
                height=height // 16,
                width=width // 16,
                seed=options.seed or 0,
                steps=options.steps or self.job.previews.steps,
                guidance=self.job.previews.guidance if options.guidance is None else options.guidance,
            )
            write_tensors(
                path,
                {"latents": draw(self.transformer, picture)},
                {"prompt": options.prompt, "step": str(self.done)},
            )
