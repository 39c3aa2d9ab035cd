"""What is worth a sentence before encoding: nothing that is wrong, but that somebody may not have meant."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from flux2_relay.stages.encode.companions import ALPHA
from flux2_relay.stages.encode.dataset import Sample
from flux2_relay.stages.encode.templates import CaptionTokenizer

_EXAMPLES = 5


def notes(samples: Sequence[Sample], tokenizer: CaptionTokenizer) -> Iterator[str]:
    """Sentences about a data set: captions that are cut, special tokens, missing masks, folders named for repeats."""
    yield from _too_long(samples, tokenizer)
    yield from _special_tokens(samples, tokenizer)
    yield from _repeats(samples)
    asked = Counter(sample.options.path for sample in samples if sample.options.masks not in (None, ALPHA))
    without = Counter(s.options.path for s in samples if s.options.masks not in (None, ALPHA) and s.mask is None)
    for path, count in without.items():
        yield f"{path}: {count} of {asked[path]} pictures have no mask; all of such a picture is trained on"


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
