"""Streamed blocks as a measurement of memory wants them."""

from collections.abc import Mapping
from concurrent.futures import wait

from flux2_relay.stages.quantize import Weight
from flux2_relay.stages.train.residence import Streamed


class Prompt(Streamed):
    """Reads that are done before the block in front of them is worked on: the most that is ever held."""

    def weights(self, place: int) -> Mapping[str, Weight]:
        """The weights of one block, once those read ahead are there."""
        found = super().weights(place)
        wait([future for _, future in self._coming])
        return found
