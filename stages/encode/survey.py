"""What becomes of the pictures of a data set, before one is decoded: buckets, what is cut off, what is too small."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flux2_relay.stages.encode import images
from flux2_relay.stages.encode.dataset import Sample
from flux2_relay.stages.encode.entries import LatentsWant, Wanted
from flux2_relay.stages.encode.images import Size

_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """Of the pictures that are trained on; references are not counted."""

    buckets: Mapping[Size, int]
    """(width, height) in pixels -> pictures, mirrored ones and repeats counted; the fullest first."""
    cut: Mapping[str, float]
    """Sample -> the largest share of its pixels that a crop loses; the most first."""
    small: Mapping[str, Size]
    """Samples with fewer pixels than a resolution asks for -> their size."""

    def lines(self) -> Iterator[str]:
        """In words, a line each."""
        for (width, height), count in self.buckets.items():
            yield f"{width} x {height}: {count} {'picture' if count == 1 else 'pictures'}"
        worst = [f"{name} {share:.0%}" for name, share in list(self.cut.items())[:_EXAMPLES] if share >= 0.005]
        if worst:
            mean = sum(self.cut.values()) / len(self.cut)
            yield f"cropping loses {mean:.1%} of the pixels on average; most of {', '.join(worst)}"
        if self.small:
            first = [f"{name} ({w} x {h})" for name, (w, h) in list(self.small.items())[:_EXAMPLES]]
            more = f" and {len(self.small) - len(first)} more" if len(self.small) > len(first) else ""
            yield (
                f"{len(self.small)} smaller than a resolution asks for (with upscale: false they keep their pixels): "
                f"{', '.join(first)}{more}"
            )


def survey(samples: Sequence[Sample], want: Wanted) -> Survey:
    """The survey of samples that `entries.wanted` was asked about."""
    buckets: Counter[Size] = Counter()
    cut, small = {}, {}
    for sample, listed in zip(samples, want.samples, strict=True):
        of_sample = [want.latents[latents["key"]] for latents in listed["latents"]]
        for of in of_sample:
            buckets[of.placement.crop[2:]] += sample.options.repeats
        cut[sample.id] = max(map(_share_cut, of_sample))
        size = of_sample[0].size
        if any(_is_small(size, resolution) for resolution in sample.options.resolutions):
            small[sample.id] = size
    by_share = sorted(cut.items(), key=lambda item: (-item[1], item[0]))
    return Survey(buckets=dict(buckets.most_common()), cut=dict(by_share), small=small)


def _share_cut(of: LatentsWant) -> float:
    (width, height), (_, _, w, h) = of.placement.resize, of.placement.crop
    return 1 - w * h / (width * height)


def _is_small(size: Size, resolution: int) -> bool:
    return images.choose_bucket(*size, resolution, False) != images.choose_bucket(*size, resolution, True)
