"""What is worth a sentence before encoding: nothing that is wrong, but that somebody may not have meant."""

import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from flux2_relay.stages.encode.companions import ALPHA
from flux2_relay.stages.encode.dataset import Sample
from flux2_relay.stages.encode.entries import Wanted
from flux2_relay.stages.encode.templates import CaptionTokenizer
from flux2_relay.stages.measure import in_words

_EXAMPLES = 5
_KEPT_FREE = 1 << 30  # bytes of a disk that nobody should count on
_SLACK_BYTES = 12 << 10  # of an entry: its folder and two files


def notes(samples: Sequence[Sample], tokenizer: CaptionTokenizer) -> Iterator[str]:
    """Sentences about a data set: captions that are cut, special tokens, missing masks, folders named for repeats."""
    yield from _too_long(samples, tokenizer)
    yield from _special_tokens(samples, tokenizer)
    yield from _repeats(samples)
    asked = Counter(sample.options.path for sample in samples if sample.options.masks not in (None, ALPHA))
    without = Counter(s.options.path for s in samples if s.options.masks not in (None, ALPHA) and s.mask is None)
    for path, count in without.items():
        yield f"{path}: {count} of {asked[path]} pictures have no mask; all of such a picture is trained on"


def of_disk(
    folder: Path,
    want: Wanted,
    missing: Mapping[str, Collection[str]],
    tokenizer: CaptionTokenizer,
    item_bytes: tuple[int, int],
) -> Iterator[str]:
    """Whether the disk of the store may be full before its end, were nothing of the entries to shrink.

    `item_bytes` are those of a text row and of a place of 16 x 16 pixels.
    """
    of_row, of_place = item_bytes
    rows = sum(tokenizer.cost(str(want.text[key]["caption"] or "")) for key in missing.get("text", ()))
    places = sum(prod(want.latents[key].placement.crop[2:]) // 256 for key in missing.get("latents", ()))
    needed = rows * of_row + places * of_place + _SLACK_BYTES * sum(map(len, missing.values()))
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = max(0, shutil.disk_usage(place).free - _KEPT_FREE)
    if needed > free:
        yield (
            f"warning: the entries to come take up to {in_words(needed)}, and {in_words(free)} are free in {place} "
            "beyond a reserve of 1 GiB: the disk may be full before the end. Make room, or set cache.path elsewhere"
        )


def _too_long(samples: Sequence[Sample], tokenizer: CaptionTokenizer) -> Iterator[str]:
    """Captions whose end the text encoder never reads."""
    found = {sample.id: max(map(tokenizer.beyond, sample.captions)) for sample in samples}
    longest = sorted(((lost, name) for name, lost in found.items() if lost), key=lambda one: (-one[0], one[1]))
    if longest:
        first = ", ".join(f"{name} (the last {lost})" for lost, name in longest[:_EXAMPLES])
        more = f" and {len(longest) - _EXAMPLES} more" if len(longest) > _EXAMPLES else ""
        yield (
            f"captions of {len(longest)} {'picture' if len(longest) == 1 else 'pictures'} are over the limit of "
            f"{tokenizer.length} tokens, the template's included, and what is beyond is not read: {first}{more}; "
            "shorten them, or put what matters first"
        )


def _repeats(samples: Sequence[Sample]) -> Iterator[str]:
    """Folders that kohya's tools would read as "10 times, a fox": here the config alone says how often."""
    found = {}
    for sample in samples:
        folder = sample.image.parent
        if sample.options.repeats == 1 and (number := re.match(r"(\d+)_", folder.name)) and int(number[1]) > 1:
            found[folder] = number[1]
    for folder, number in found.items():
        yield f"{folder}: its name does not repeat it {number} times; if it should be, name it in `data` with `repeats`"


def _special_tokens(samples: Sequence[Sample], tokenizer: CaptionTokenizer) -> Iterator[str]:
    spellings = sorted(tokenizer.special_spellings(), key=len, reverse=True)
    if not spellings:
        return
    pattern = re.compile("|".join(map(re.escape, spellings)))
    found = {}
    for sample in samples:
        for caption in sample.captions:
            if spelled := pattern.findall(caption):
                found.setdefault(sample.id, dict.fromkeys(spelled))
    if found:
        first = ", ".join(f"{name} ({' '.join(spelled)})" for name, spelled in list(found.items())[:_EXAMPLES])
        more = f" and {len(found) - _EXAMPLES} more" if len(found) > _EXAMPLES else ""
        yield (
            f"captions of {len(found)} {'picture' if len(found) == 1 else 'pictures'} spell special tokens, which the "
            f"text encoder does not read as words, as in the original pipeline: {first}{more}"
        )
