"""`relay` with one mistake planted, or none:

    python tests/score/faults.py FAULT COMMAND ...

The program has no option for it: functions are replaced before the command runs, and only in this process.
At the end the peak of the process goes to stderr, in bytes.
"""

import sys
from collections.abc import Callable
from dataclasses import replace


def none() -> None:
    """The program as it is."""


def latents_not_normalised() -> None:
    """The VAE's statistics are left out when pictures are encoded."""
    from flux2_relay.stages import vae

    vae._normalise = lambda latents, weights, eps: latents  # pyright: ignore[reportPrivateUsage]


def captions_shuffled() -> None:
    """Every picture gets the caption of the one five places further on."""
    from flux2_relay.stages.encode import dataset

    read = dataset.read_samples

    def shuffled(*given: object) -> tuple[dataset.Sample, ...]:
        samples = read(*given)  # pyright: ignore[reportArgumentType]
        others = samples[5:] + samples[:5]
        return tuple(replace(sample, captions=other.captions) for sample, other in zip(samples, others, strict=True))

    dataset.read_samples = shuffled


def sigma_reversed() -> None:
    """Training mixes as much noise as there should be data, and the other way round."""
    from flux2_relay.stages.train import objective

    add_noise = objective.add_noise
    objective.add_noise = lambda latents, noise, sigma: add_noise(latents, noise, 1 - sigma)


FAULTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant for plant in (none, latents_not_normalised, captions_shuffled, sigma_reversed)
}


if __name__ == "__main__":
    from flux2_relay.pipeline import cli
    from flux2_relay.stages import measure

    FAULTS[sys.argv.pop(1)]()
    try:
        cli.main()
    finally:
        print(f"peak {measure.peak_resident_bytes()}", file=sys.stderr)
