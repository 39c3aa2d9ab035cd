"""LoRAs of several runs at one linear: one base product over the rows of all of them, each adapter on its own rows.

The runs stand one behind the other in the batch, each with as many items. Narrower adapters are filled up with zeros to
the widest, and a run that has none here has one of zeros: all small products of a kind are then one batched product.
What is found for the filling is left out by `parted`.

Letters: N runs, R rows of each, r the highest rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, cast

import mlx.core as mx

from flux2_relay.stages.train.blocks import Block
from flux2_relay.stages.train.cuts import cut, flat, joined, product, split
from flux2_relay.stages.train.kinds import Adapter, Kept, Lora, Named
from flux2_relay.stages.train.transformer import Transformer


class Beside(NamedTuple):
    """A [N, r, in], B [N, out, r] and scale [N, 1, 1]; each in a tuple, as no other kind has it."""

    a: tuple[mx.array]
    b: tuple[mx.array]
    scale: tuple[mx.array]

    def apply(self, x: mx.array, weight: mx.array) -> mx.array:
        """The base product of all runs' rows plus what each run's adapter makes of its own."""
        low = self._down([self._rows(x)]) @ self.b[0].astype(x.dtype).swapaxes(1, 2)
        return mx.addmm(flat(low), flat(x), weight.T).reshape(*x.shape[:-1], -1)

    def pull(self, cotangents: Sequence[mx.array], weight: mx.array) -> tuple[mx.array, mx.array]:
        """The cotangent of the input, and that of each run's Ax [N, R, r]."""
        dtype, rows = cotangents[0].dtype, [self._rows(g) for g in cotangents]
        low = product(rows, cut(self.b[0].astype(dtype), rows, axis=1)) * self.scale[0].astype(dtype)
        total = (low @ self.a[0].astype(dtype)).reshape(*cotangents[0].shape[:-1], -1)
        return product(cotangents, cut(weight, cotangents, axis=0), total), low

    def gradients(
        self, inputs: Sequence[mx.array], cotangents: Sequence[mx.array], kept: Kept, weight: mx.array
    ) -> Named:
        """Of A [N, r, in] and B [N, out, r], float32; `kept` is the cotangent of Ax."""
        assert isinstance(kept, mx.array)
        rows = [self._rows(x) for x in inputs]
        of_a = [kept.swapaxes(1, 2) @ x for x in rows]
        down = self._down(rows)
        of_b = [self._rows(g).swapaxes(1, 2) @ down for g in cotangents]
        found = joined(of_a, axis=2).astype(mx.float32), joined(of_b, axis=1).astype(mx.float32)
        return dict(zip(_FACTORS, found, strict=True))

    def _rows(self, x: mx.array) -> mx.array:
        """x [N items, rows, n] as [N, R, n]."""
        return x.reshape(self.a[0].shape[0], -1, x.shape[-1])

    def _down(self, rows: Sequence[mx.array]) -> mx.array:
        """scale * Ax [N, R, r] of an input in pieces."""
        dtype = rows[0].dtype
        parts = [columns.swapaxes(1, 2) for columns in cut(self.a[0].astype(dtype), rows, axis=2)]
        return product(rows, parts) * self.scale[0].astype(dtype)


_FACTORS = "lora_A.weight", "lora_B.weight"


def are_joinable(transformer: Transformer) -> bool:
    """Whether its adapters can stand beside those of other runs: plain LoRA without dropout."""
    return all(isinstance(adapter, Lora) and not adapter.dropping for adapter in transformer.adapters.values())


@dataclass(slots=True)
class Joined(Transformer):
    """One transformer for passes of several runs, which share its base."""

    runs: Sequence[Transformer] = ()

    def block(self, place: int) -> Block:
        """The block with the adapters of all; they are joined when they are needed, and let go of with it."""
        of_runs = [run.block(place) for run in self.runs]
        return Block(of_runs[0].weights, stacked([block.adapters for block in of_runs]), of_runs[0].sizes)


def joined_runs(runs: Sequence[Transformer]) -> Joined:
    """The transformers of several runs over one base, for a batch in which those stand one behind the other."""
    shared = {of.name: getattr(runs[0], of.name) for of in fields(Transformer) if of.name != "adapters"}
    adapters = {name: adapter for run in runs for name, adapter in run.adapters.items()}
    return Joined(**shared, adapters=adapters, runs=runs)


def stacked(runs: Sequence[Mapping[str, Adapter]]) -> dict[str, Adapter]:
    """The adapters of several runs, by the names of their linears, as one of each linear; not yet computed."""
    names = dict.fromkeys(name for run in runs for name in run)
    # Of adapters in training nothing else is asked but what `Beside` has.
    return {name: cast(Adapter, _stacked([cast(Lora | None, run.get(name)) for run in runs])) for name in names}


def _stacked(adapters: Sequence[Lora | None]) -> Beside:
    there = [adapter for adapter in adapters if adapter is not None]
    rank = max(adapter.a.shape[0] for adapter in there)
    none = Lora(mx.zeros((rank, there[0].a.shape[1])), mx.zeros((there[0].b.shape[0], rank)), mx.zeros(()))
    runs = [none if adapter is None else adapter for adapter in adapters]
    a = mx.stack([_filled(run.a, 0, rank) for run in runs])
    b = mx.stack([_filled(run.b, 1, rank) for run in runs])
    return Beside((a,), (b,), (mx.stack([run.scale for run in runs]).reshape(-1, 1, 1),))


def _filled(factor: mx.array, axis: int, rank: int) -> mx.array:
    """Zeros behind it, up to the rank."""
    lacking = [0, 0]
    lacking[axis] = rank - factor.shape[axis]
    return mx.pad(factor, [(0, less) for less in lacking]) if any(lacking) else factor


def parted(gradients: Mapping[str, mx.array], runs: Sequence[Mapping[str, mx.array]]) -> Iterator[dict[str, mx.array]]:
    """The gradients of each run, named and shaped as what it trains, from those of all [N, …]."""
    parts = {name: split(value, len(runs), axis=0) for name, value in gradients.items()}
    for number, trained in enumerate(runs):
        yield {name: _cut_to(parts[name][number].squeeze(0), of.shape) for name, of in trained.items()}


def _cut_to(value: mx.array, shape: tuple[int, ...]) -> mx.array:
    return value if value.shape == shape else value[: shape[0], : shape[1]]
