"""What an adapter's file says of itself: strings in the header, which programs show and none of them needs.

Keys are those of Stability's ModelSpec 1.0.0, of kohya's scripts, and our own, `flux2_relay.…`.
"""

from collections.abc import Mapping

from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train import adapter_formats
from flux2_relay.stages.train.adapter_formats import Format
from flux2_relay.stages.train.adapter_sizes import family_of
from flux2_relay.stages.train.updates import Updates

_OF_THE_SOURCE = ("lora_adapter_metadata", "sshs_", "ss_network_", "ss_base_model_version", "flux2_relay.dora_over")
"""What holds for the file that was read and for no other: how its strengths are read, and hashes of its tensors."""


def card(form: Format, factors: Updates, spec: TransformerSpec, said: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file in this format, on top of what its source `said`."""
    ranks = {part.rank for part in factors.values() if part.rank is not None}
    alphas = {f"{part.strength * (part.rank or 1):g}" for part in factors.values()}
    kinds = sorted({part.kind for part in factors.values()} - {"lora"})
    rank, alpha = (str(ranks.pop()) if len(ranks) == 1 else None), (alphas.pop() if len(alphas) == 1 else None)
    kept = {key: value for key, value in said.items() if not key.startswith(_OF_THE_SOURCE)}
    own = {"flux2_relay.rank": rank or "mixed", "flux2_relay.alpha": alpha or "mixed"}
    own |= {"flux2_relay.kind": ", ".join(kinds)} if kinds else {}
    header = _kohya(rank, alpha, family_of(spec)) if form.kohya_header else {}
    needed = adapter_formats.header(factors)
    return {**own, **_modelspec(family_of(spec)), **kept, "format": "pt", **header, **needed}


def _modelspec(family: str | None) -> dict[str, str]:
    said = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
    }
    return said if family is None else {**said, "modelspec.architecture": f"Flux.2-{family}/lora"}


def _kohya(rank: str | None, alpha: str | None, family: str | None) -> dict[str, str]:
    """The least that musubi-tuner writes; "Dynamic" is kohya's word for ranks that differ."""
    said = {
        "ss_network_module": "networks.lora_flux_2",
        "ss_network_dim": rank or "Dynamic",
        "ss_network_alpha": alpha or "Dynamic",
        "ss_network_args": "{}",
    }
    return said if family is None else {**said, "ss_base_model_version": f"flux_2_{family.replace('-', '_')}"}
