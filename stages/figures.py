"""What this machine was measured to do, so that a plan can say how long the next run takes.

A stage notes a rate when it ends; it lies in the user's cache folder beside the digests of `identity.py`, under all
that it depends on, the device included. Nothing is guessed: without a figure there is no prediction.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from flux2_relay.stages.identity import Memo

_TRUSTED_SHARE = 0.2  # of the time an older figure was measured over: a shorter one does not replace it


@dataclass(frozen=True, slots=True)
class Figure:
    """A rate, and over how many seconds it was measured."""

    per_second: float
    seconds: float


def note(what: str, of: Mapping[str, object], amount: float, seconds: float) -> None:
    """Remember that `amount` of `what` took `seconds` under the circumstances `of` (plain values)."""
    before = recall(what, of)
    if amount <= 0 or seconds <= 0 or (before is not None and seconds < _TRUSTED_SHARE * before.seconds):
        return
    with Memo() as memo:
        memo.put(_key(what, of), json.dumps([amount / seconds, seconds]))


def recall(what: str, of: Mapping[str, object]) -> Figure | None:
    """The rate under these circumstances on this device, None where none was measured."""
    with Memo() as memo:
        found = memo.get(_key(what, of))
    try:
        return Figure(*map(float, json.loads(found))) if found else None
    except (TypeError, ValueError):
        return None


def _key(what: str, of: Mapping[str, object]) -> str:
    return f"figure 1|{what}|{json.dumps({**of, 'device': device()}, sort_keys=True)}"


def device() -> str:
    """The device that MLX computes on, in words."""
    if mx.default_device() == mx.Device(mx.gpu):
        return str(mx.device_info().get("device_name", "GPU"))
    return f"CPU {platform.processor() or platform.machine()}"
