"""What the adapter of a run says of itself, in the header of its file: strings only, as safetensors has it."""

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version

from flux2_relay.pipeline.config import Config, flat


def of_run(config: Config, set_key: str) -> dict[str, str]:
    """From a run's config and the key of the set that it is trained on."""
    trigger = ", ".join(options.trigger for options in config.data if options.trigger)
    side = max(side for options in config.data for side in options.resolutions)
    said = {
        "flux2_relay.version": version("flux2-relay"),
        "flux2_relay.base": config.model.path.rstrip("/").rpartition("/")[2],
        "flux2_relay.rank": str(config.lora.rank),
        "flux2_relay.alpha": str(config.lora.alpha),
        "flux2_relay.trigger": trigger,
        "flux2_relay.config": config_hash(config),
        "flux2_relay.set": set_key,
        "modelspec.title": config.run.name,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "ss_output_name": config.run.name,
        "ss_seed": str(config.run.seed),
    }
    return {**said, "modelspec.trigger_phrase": trigger} if trigger else said


def config_hash(config: Config) -> str:
    """SHA-256 of the resolved config, written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(flat(config), sort_keys=True).encode()).hexdigest()
