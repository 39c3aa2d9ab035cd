"""An adapter as a file for other programs, which is not there until it has been read back and compared."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages.files import write_tensors
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_card, adapter_file, adapter_formats, adapter_proof
from flux2_relay.stages.train.adapter_file import Factors
from flux2_relay.stages.train.adapter_formats import FORMATS, Format
from flux2_relay.stages.train.adapter_proof import Difference
from flux2_relay.stages.train.transformer import Transformer
from flux2_relay.stages.weights import listing

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
LIMITS = {mx.bfloat16: 1e-2, mx.float16: 2e-3, mx.float32: 2e-6}
"""Largest difference of a module's update, by its norm, that rounding both factors to a type may make."""


def write(
    path: Path,
    factors: Mapping[str, Factors],
    spec: TransformerSpec,
    form: Format,
    said: Mapping[str, str],
    dtype: mx.Dtype,
) -> Difference:
    """Write an adapter in a format, its factors in `dtype` -> how far the file is from `factors`.

    `said` is what the header says besides. InputError names modules that the format cannot carry, or that are not
    finite; RelayError, with nothing left under `path`, where the file does not hold the same updates.
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


def write_diffusers(
    transformer: Transformer, path: Path | str, metadata: Mapping[str, str], dtype: mx.Dtype = mx.float32
) -> None:
    """The adapters of a transformer under diffusers' names, alpha / rank folded into B; errors as for `write`."""
    factors = {module: Factors(a, b, float(scale)) for module, (a, b, scale, _) in transformer.adapters.items()}
    write(Path(path), factors, transformer.spec, FORMATS["diffusers"], metadata, dtype)
