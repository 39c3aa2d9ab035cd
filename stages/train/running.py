"""A run under way: one step after another, and what is due after each.

What the next step depends on is the adapter, the optimizer, the mean and the count of steps: a checkpoint holds just
that (`checkpoint.py`), and everything random is a function of (seed, step, item).
"""

import math
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np

from flux2_relay.cache.errors import RelayError
from flux2_relay.stages import blas
from flux2_relay.stages.measure import peak_bytes
from flux2_relay.stages.train import checkpoint, ema, init, lora, optimizer, warnings
from flux2_relay.stages.train.batches import Loaded
from flux2_relay.stages.train.export import DTYPES, write_finished
from flux2_relay.stages.train.job import Job, Journal
from flux2_relay.stages.train.previews import Previews
from flux2_relay.stages.train.resume import digest_of_data
from flux2_relay.stages.train.step import Found, Terms, gradients_of, sigmas_of
from flux2_relay.stages.train.transformer import Transformer
from flux2_relay.stages.train.validation import Validation

MOST_SKIPPED = 5
"""Steps in a row whose loss or gradient was not finite, after which the run stops."""


class Run:
    """The adapters, moments and mean after `done` steps."""

    def __init__(
        self, job: Job, transformer: Transformer, journal: Journal, previews: Previews, validation: Validation
    ) -> None:
        """Fresh adapters on `transformer`, and nothing done yet."""
        self.job, self.transformer, self.journal = job, transformer, journal
        self.previews, self.validation = previews, validation
        self.done = self.saved = self.skipped = 0
        self.best: tuple[float, int] | None = None  # least held-out loss, and its step
        lora.attach(transformer, job.lora, job.seed)
        self.optimizer = optimizer.Optimizer(job.train, lora.parameters(transformer))
        self.mean = lora.parameters(transformer) if job.train.ema is not None else None
        self.terms = Terms(job.seed, job.train, job.lora.dropout)

    def begin(self) -> int:
        """Take up the newest whole checkpoint, or do what is due before the first step -> steps done."""
        group = self.job.group
        found, complaints = None, []
        if self.job.resume and group.is_first:
            found, complaints = checkpoint.latest(self.job.checkpoints)
        for complaint in complaints:
            self.journal.say(complaint)
        if found is not None:
            self._take_up(found)
        elif self.job.lora.init is not None:
            init.start(self.transformer, self.job.lora)
            self.mean = None if self.mean is None else lora.parameters(self.transformer)
        self._follow()
        self.journal.rewind(self.done)
        if self.done == 0 and self.validation:
            self._validate()
        self._draw_previews()
        return self.done

    def step(self, loaded: Loaded) -> float | None:
        """One step, its line in the journal, and what is due after it -> its loss, None where it was skipped."""
        started = time.perf_counter()
        return self.learn(loaded, gradients_of(self.transformer, loaded, self.terms), started)

    def learn(self, loaded: Loaded, found: Found, started: float) -> float | None:
        """The step whose gradients were `found` since `started`; what `step` does besides finding them."""
        loss, gradients, sigmas = found
        del found  # not to be held beside what becomes of them
        group = self.job.group
        waited = group.waits.seconds
        loss, gradients = group.average(loss, gradients)
        gradients, norm = optimizer.clip(gradients, self.job.train.clip)
        is_finite = bool(mx.isfinite(loss + norm).item())
        if is_finite:
            self._update(gradients, loaded.step)
        self.done = loaded.step + 1
        self.journal.write(
            {
                "step": self.done,
                "loss": loss.item() if is_finite else None,
                "lr": optimizer.learning_rate(self.job.train, loaded.step),
                "grad_norm": norm.item() if is_finite else None,
                "sigma": sigmas if group.is_alone else sigmas_of(loaded, self.terms),
                "seconds": round(time.perf_counter() - started, 4),
                "wait_seconds": round(loaded.wait_seconds, 4),
                "peak_bytes": peak_bytes(),
                **({} if group.is_alone else {"reduce_seconds": round(group.waits.seconds - waited, 4)}),
            }
        )
        self._count(is_finite, loss, norm, loaded)
        self._look_at_adapter()
        self._after_step()
        return float(loss) if is_finite else None

    def save(self) -> bool:
        """A checkpoint of where the run stands, by the first rank; where it cannot be written, a sentence and False."""
        if not self.job.group.is_first:
            self.saved = self.done
            return True
        try:
            checkpoint.save(self.job.checkpoints, self._checkpoint(), self.job.save.keep)
            if self.best is not None and self.best[1] == self.done:
                checkpoint.mark_best(self.job.checkpoints, self.done)
        except (OSError, RelayError) as error:
            self.journal.say(
                f"the checkpoint of step {self.done} could not be written ({error}); training goes on, and "
                f"{self.where_to_go_on()}"
            )
            return False
        self.saved = self.done
        return True

    def finish(self) -> None:
        """A checkpoint of where the run stands, and its adapter; RelayError where either cannot be written."""
        if not self.job.group.is_first:
            return
        is_saved = self.done == self.saved or self.save()
        try:
            self._export(self.transformer, "adapter.safetensors")
            if self.mean is not None:
                shadow = replace(self.transformer)
                lora.load(shadow, self.mean)
                self._export(shadow, "adapter_ema.safetensors")
        except (OSError, RelayError) as error:
            raise RelayError(f"the adapter could not be written: {error}. {self._after_a_full_disk()}") from error
        if not is_saved:
            raise RelayError(f"the last checkpoint could not be written. {self._after_a_full_disk()}")

    def where_to_go_on(self) -> str:
        """What the next start does, as a sentence."""
        if not self.saved:
            return "the next start begins anew, as no checkpoint has been written yet"
        return f"the next start goes on from the checkpoint of step {self.saved}"

    def _after_a_full_disk(self) -> str:
        return f"Make room in {self.job.folder} and start again: {self.where_to_go_on()}."

    def _update(self, gradients: dict[str, mx.array], step: int) -> None:
        updated = self.optimizer.update(lora.parameters(self.transformer), gradients, step)
        lora.load(self.transformer, updated)
        if self.mean is not None and self.job.train.ema is not None:
            self.mean = ema.follow(self.mean, updated, self.job.train.ema, step)

    def _count(self, is_finite: bool, loss: mx.array, norm: mx.array, loaded: Loaded) -> None:
        if is_finite:
            self.skipped = 0
            return
        self.skipped += 1
        names = ", ".join(sorted({drawn.item.id for draws in loaded.whole for drawn in draws}))
        said = f"step {self.done}: loss {loss.item()}, norm of the gradient {norm.item()}; the batch was {names}"
        if self.skipped >= MOST_SKIPPED:
            raise RelayError(
                f"{said}. It is the {self.skipped}th such step in a row; the adapter is as it was before them. A lower "
                f"train.lr is the usual remedy, or look at these pictures: {self.where_to_go_on()}."
            )
        self.journal.say(f"{said}; the step was skipped")

    def _look_at_adapter(self) -> None:
        if self.done == warnings.LOOK_AT and (sentence := warnings.of_adapter(lora.parameters(self.transformer))):
            self.journal.say(f"warning: {sentence}")

    def _follow(self) -> None:
        """Go on from what the first rank has: its count of steps, adapters, moments and mean, to the bit.

        At the beginning only that rank has read a checkpoint; later it is a safeguard: a backend may give the ranks
        sums that differ in their last bits, and those add up.
        """
        group = self.job.group
        if group.is_alone:
            return
        counts = group.follow({"": mx.array([self.done, self.saved, self.skipped], mx.uint32)})[""]
        self.done, self.saved, self.skipped = (int(count) for count in np.array(counts))
        lora.load(self.transformer, group.follow(lora.parameters(self.transformer)))
        self.optimizer.restore(group.follow(self.optimizer.state()))
        self.mean = None if self.mean is None else group.follow(self.mean)

    def _after_step(self) -> None:
        if self.validation and self._is_due(self.job.validation.every):
            self._validate()
        if self._is_due(self.job.save.every):
            self._follow()
        if self._is_due(self.job.save.every) or self._is_best_now():
            self.save()
        self._draw_previews()

    def _is_due(self, every: int) -> bool:
        return self.done == self.job.train.steps or self.done % every == 0

    def _is_best_now(self) -> bool:
        return self.done > 0 and self.best is not None and self.best[1] == self.done

    def _validate(self) -> None:
        """The held-out loss, its line, and whether it is the best so far; that of the untrained adapter never is."""
        found = self.validation.loss(self.transformer)
        self.journal.write_validation(found.line(self.done))
        if self.done and (self.best is None or found.mean < self.best[0]) and math.isfinite(found.mean):
            self.best = found.mean, self.done

    def _draw_previews(self) -> None:
        every = self.job.previews.every
        if not every or not self._is_due(every):
            return
        try:
            self.previews.draw(self.transformer, self.done, again=self.done != self.saved)
        except (OSError, RelayError) as error:
            self.journal.say(f"the previews of step {self.done} could not be written ({error}); training goes on")

    def _checkpoint(self) -> checkpoint.Checkpoint:
        job, best = self.job, self.best
        state = checkpoint.State(
            step=self.done,
            seed=job.seed,
            set=job.record.key,
            data=digest_of_data(job.record.body),
            config=job.config,
            blas_threads=blas.threads(),
            skipped=self.skipped,
            best_step=best[1] if best else None,
            best_loss=best[0] if best else None,
            has_ema=self.mean is not None,
            ranks=job.group.size,
        )
        return checkpoint.Checkpoint(
            state=state,
            adapter=lora.parameters(self.transformer),
            optimizer=self.optimizer.state(),
            ema=self.mean,
            metadata=lora.metadata(self.transformer, job.lora),
        )

    def _take_up(self, found: checkpoint.Checkpoint) -> None:
        state = found.state
        lora.load(self.transformer, found.adapter)
        self.optimizer.restore(found.optimizer)
        self.done = self.saved = state.step
        self.skipped = state.skipped
        if state.best_step is not None and state.best_loss is not None:
            self.best = state.best_loss, state.best_step
        checkpoint.mark_best(self.job.checkpoints, state.best_step)
        if self.mean is not None:
            self.mean = dict(found.ema) if found.ema is not None else lora.parameters(self.transformer)
        self._say_threads(state.blas_threads)
        self.journal.say(f"going on from the checkpoint of step {self.done}")

    def _say_threads(self, before: int | None) -> None:
        now = blas.threads()
        if None not in (before, now) and before != now and mx.default_device() == mx.Device(mx.cpu):
            self.journal.say(
                f"the BLAS has {now} threads and had {before}: what follows may differ in the last bits from a run "
                "that was not interrupted (OPENBLAS_NUM_THREADS sets the number)"
            )

    def _export(self, transformer: Transformer, name: str) -> None:
        metadata = {**self.job.metadata, "flux2_relay.steps": str(self.done)}
        write_finished(transformer, self.job.folder / name, metadata, DTYPES[self.job.save.dtype])
