"""Starting from somebody's adapter: `lora.init`.

`lora.kind`, `lora.rank`, `lora.alpha` and `lora.targets` say what is trained; the file says where it starts. The update
of each of its modules is taken over exactly: a rank below ours is filled up with fresh rows of A whose columns of B are
zero, and the two strengths are settled in B. A higher rank, another kind, or a module that is not trained, would lose
something: refused.
"""

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_file, lora, mixing
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import Transformer
from flux2_relay.stages.train.updates import Update
from flux2_relay.stages.weights import listing


def read(options: LoraOptions, spec: TransformerSpec) -> dict[str, Update]:
    """The updates in the file of `lora.init`; InputError names each that cannot be taken over whole."""
    assert options.init is not None
    found, trained = adapter_file.read(options.init, spec), lora.targets(spec, options)
    faults = [f"{path} is not among lora.targets" for path in found if path not in trained]
    for path, update in found.items():
        if update.kind != options.kind:
            faults.append(f"{path} is of the kind {update.kind} there and {options.kind} here (lora.kind)")
        elif path in trained and (said := update.unfit(trained[path], lora.rank_of(path, options), options)):
            faults.append(f"{path} {said}")
    if faults:
        raise InputError(listing(f"lora.init: {options.init} cannot be started from:", faults))
    return found


def start(transformer: Transformer, options: LoraOptions) -> None:
    """Set the fresh adapters of `transformer` to what the file of `lora.init` holds; modules not in it stay fresh."""
    adapters = dict(transformer.adapters)
    for path, update in mixing.measured(read(options, transformer.spec), transformer).items():
        adapters[path] = update.start(adapters[path])
    mx.eval(adapters)
    transformer.adapters = adapters
