"""An adapter as a file for other programs, which is not there until it has been read back and compared."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages.files import write_tensors
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_card, adapter_file, adapter_formats, adapter_proof, visits
from flux2_relay.stages.train.adapter_formats import Format
from flux2_relay.stages.train.adapter_proof import Difference
from flux2_relay.stages.train.dora import Dora
from flux2_relay.stages.train.dora_update import DoraUpdate
from flux2_relay.stages.train.kinds import Adapter, Lora
from flux2_relay.stages.train.lokr import Lokr
from flux2_relay.stages.train.lokr_update import LokrUpdate
from flux2_relay.stages.train.transformer import Transformer, block_linears
from flux2_relay.stages.train.updates import Factors, Update, Updates
from flux2_relay.stages.weights import listing

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
LIMITS = {mx.bfloat16: 1e-2, mx.float16: 2e-3, mx.float32: 2e-6}
"""Largest difference of a module's update, by its norm, that rounding both factors to a type may make."""
Base = Callable[[str], Iterator[mx.array]]
"""Module path -> the rows of the base's matrix in order, stretches [n, in] float32."""


def write(
    path: Path,
    factors: Updates,
    spec: TransformerSpec,
    form: Format,
    said: Mapping[str, str],
    dtype: mx.Dtype,
) -> Difference:
    """Write an adapter in a format, its factors in `dtype` -> how far the file is from `factors`.

    `said` is what the header says besides; `factors` are `suited` to the format. InputError names modules that the
    format cannot carry, or that are not finite; RelayError, with nothing left under `path`, where the file does not
    hold the same updates.
    """
    if faults := adapter_proof.not_finite(factors):
        raise InputError(listing("these modules of the adapter hold numbers that are not finite:", faults))
    values = adapter_formats.tensors(form, factors, spec, dtype)
    found = []

    def prove(aside: Path) -> None:
        difference = adapter_proof.largest(factors, adapter_file.read(aside, spec))
        if not difference.error <= LIMITS[dtype]:
            name = next(name for name, known in DTYPES.items() if known == dtype)
            raise RelayError(
                f"{path} was not written: read back, the update of {difference.module} differs by "
                f"{difference.error:.1e} of its norm ({LIMITS[dtype]:.0e} is what {name} may cost); try float32"
            )
        found.append(difference)

    write_tensors(path, values, adapter_card.card(form, factors, spec, said), prove)
    return found[0]


def suited(factors: Updates, form: Format, base: Base | None) -> dict[str, Update]:
    """The updates as the format's reader takes them: lengths of DoRA over the rows that it divides them by.

    InputError where that takes the base, and there is none.
    """
    found = dict(factors)
    for path, update in factors.items():
        if isinstance(update, DoraUpdate) and update.over_base != form.over_base:
            if base is None:
                raise InputError(
                    f"--format {form.name}: its reader divides the lengths of DoRA by those of other rows; name the "
                    "base model with -c FILE"
                )
            found[path] = update.measured(base(path), form.over_base)
    return found


def updates_of(transformer: Transformer) -> dict[str, Update]:
    """What the adapters of a transformer do."""
    return {path: _UPDATES[type(adapter)](adapter) for path, adapter in transformer.adapters.items()}


def _of_lora(adapter: Lora) -> Factors:
    return Factors(adapter.a, adapter.b, float(adapter.scale))


def _of_dora(adapter: Dora) -> DoraUpdate:
    return DoraUpdate(_of_lora(adapter.low), adapter.magnitude, squares=adapter.squares)


def _of_lokr(adapter: Lokr) -> LokrUpdate:
    return LokrUpdate(adapter.w1, adapter.w2, float(adapter.scale))


_UPDATES: Mapping[type[Adapter], Callable[..., Update]] = {Lora: _of_lora, Dora: _of_dora, Lokr: _of_lokr}


def write_finished(
    transformer: Transformer, path: Path | str, metadata: Mapping[str, str], dtype: mx.Dtype = mx.float32
) -> None:
    """The adapters of a transformer in the first format that carries them; errors as for `write`."""
    factors = updates_of(transformer)

    def base(module: str) -> Iterator[mx.array]:
        ((_, weight),) = visits.linears(transformer, [module])
        return visits.stretches(weight, block_linears(transformer.spec)[module][1])

    form = adapter_formats.for_runs({update.kind for update in factors.values()})
    write(Path(path), suited(factors, form, base), transformer.spec, form, metadata, dtype)
