"""Starting from somebody's adapter: `lora.init`.

`lora.rank`, `lora.alpha` and `lora.targets` say what is trained; the file says where it starts. The update of each of
its modules is taken over exactly: a rank below ours is filled up with fresh rows of A whose columns of B are zero, and
the two strengths are settled in B. A higher rank, or a module that is not trained, would lose something: refused.
"""

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_file, lora
from flux2_relay.stages.train.adapter_file import Factors
from flux2_relay.stages.train.options import LoraOptions
from flux2_relay.stages.train.transformer import Transformer
from flux2_relay.stages.weights import listing


def read(options: LoraOptions, spec: TransformerSpec) -> dict[str, Factors]:
    """The updates in the file of `lora.init`; InputError names each that cannot be taken over whole."""
    assert options.init is not None
    found, trained = adapter_file.read(options.init, spec), lora.targets(spec, options)
    faults = [f"{path} is not among lora.targets" for path in found if path not in trained]
    for path, factors in found.items():
        rank, ours = factors.a.shape[0], lora.rank_of(path, options)
        if path in trained and rank > ours:
            faults.append(f"{path} has rank {rank} there and {ours} here (lora.rank, lora.ranks)")
    if faults:
        raise InputError(listing(f"lora.init: {options.init} cannot be started from:", faults))
    return found


def start(transformer: Transformer, options: LoraOptions) -> None:
    """Set the fresh adapters of `transformer` to what the file of `lora.init` holds; modules not in it stay fresh."""
    adapters = dict(transformer.adapters)
    for path, factors in read(options, transformer.spec).items():
        a, b, scale = adapters[path][:3]
        rank = factors.a.shape[0]
        start_b = factors.b * (factors.scale / scale)
        adapters[path] = adapters[path].with_weights(
            {
                "lora_A.weight": mx.concatenate([factors.a, a[rank:]], axis=0),
                "lora_B.weight": mx.concatenate([start_b, b[:, rank:]], axis=1),
            }
        )
    mx.eval(adapters)
    transformer.adapters = adapters
