"""The data set on a report: every bucket counted, and some pictures with their captions, where there is a copy of them.

Captions and file names are whatever somebody wrote: all of it is escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from flux2_relay.pipeline.origin import thumbnail_of
from flux2_relay.pipeline.report_pictures import address
from flux2_relay.pipeline.run_folder import RunFolder


def data_set(run: RunFolder, origin: Mapping[str, Any]) -> str:
    """The section; a sentence where the run does not say what it was trained on."""
    try:
        return _section(run, origin["data"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return (
            '<h2>Data set</h2>\n<p class="hint">This run does not say what it was trained on: it was begun by an older '
            "release, or its origin.json is damaged. <code>relay train</code> writes it when it begins or goes on.</p>"
        )


def _section(run: RunFolder, data: Mapping[str, Any]) -> str:
    shown = data["shown"]
    cards = [_card(run, sample) for sample in shown]
    copied = sum("<img" in card for card in cards)
    parts = [f'<p class="counts">{escape(_counted(data))}</p>', _buckets(data["buckets"])]
    if len(shown) < data["pictures"]:
        parts.append(f'<p class="hint">{len(shown)} of them, evenly spread:</p>')
    if copied < len(shown):
        parts.append(f'<p class="hint">{_missing(len(shown) - copied, len(shown))}</p>')
    parts.append(f'<ul class="samples">{"".join(cards)}</ul>' if cards else "")
    return "<h2>Data set</h2>\n" + "\n".join(filter(None, parts))


def _counted(data: Mapping[str, Any]) -> str:
    said = [_count(data["pictures"], "picture"), _count(data["captions"], "caption")]
    said += [f"{data['held_out']} held out"] if data["held_out"] else []
    said += [f"{data['prior']} for regularisation"] if data["prior"] else []
    return ", ".join(said)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _missing(missing: int, shown: int) -> str:
    whose = "None of these pictures is" if missing == shown else f"{missing} of these {shown} pictures are not"
    return (
        f"{whose} on this machine as it was encoded (moved, changed, or never here: training needs the store alone), "
        "so there is nothing to show of it but captions and buckets."
    )


def _buckets(buckets: Sequence[Sequence[int]]) -> str:
    """Each bucket in its shape, with how many pictures it holds."""
    longest = max((max(width, height) for width, height, _ in buckets), default=1)
    return f'<ul class="buckets">{"".join(_bucket(w, h, count, longest) for w, h, count in buckets)}</ul>'


def _bucket(width: int, height: int, count: int, longest: int) -> str:
    across, up = (round(44 * side / longest, 1) for side in (width, height))
    shape = f'<svg viewBox="0 0 46 46" aria-hidden="true"><rect x="{(46 - across) / 2:.1f}" y="{(46 - up) / 2:.1f}" '
    return (
        f'<li>{shape}width="{across}" height="{up}" rx="2"/></svg><span>{width} x {height}'
        f"<small>{_count(count, 'picture')}</small></span></li>"
    )


def _card(run: RunFolder, sample: Mapping[str, Any]) -> str:
    captions = "".join(f"<p>{escape(str(one))}</p>" if one else "<p><i>no words</i></p>" for one in sample["captions"])
    more = sample["all_captions"] - len(sample["captions"])
    captions += f"<p><i>and {_count(more, 'more caption')}</i></p>" if more else ""
    said = "".join(f"<small>{escape(line)}</small>" for line in _told(sample))
    return f"<li>{_picture(run, sample)}<div>{captions}{said}</div></li>"


def _picture(run: RunFolder, sample: Mapping[str, Any]) -> str:
    """The small copy, or an empty frame of the bucket's shape."""
    for latents in sample["latents"][:1]:
        width, height = map(int, latents["size"])
        try:
            source = address("jpeg", thumbnail_of(run, latents).read_bytes())
        except OSError:
            return f'<div class="none" style="aspect-ratio: {width} / {height}">not here</div>'
        caption = str(sample["captions"][0]) if sample["captions"] else ""
        return f'<img width="{width}" height="{height}" alt="{escape(caption or sample["id"])}" src="{source}">'
    return '<div class="none">not encoded</div>'


def _told(sample: Mapping[str, Any]) -> Iterator[str]:
    sizes = dict.fromkeys("{} x {}".format(*latents["size"]) for latents in sample["latents"])
    yield f"{sample['id']}: {', '.join(sizes)}"
    first = sample["latents"][0] if sample["latents"] else {}
    marks = [f"seen {sample['repeats']} times"] if sample["repeats"] != 1 else []
    marks += ["held out"] if sample["held_out"] else []
    marks += ["regularisation"] if sample["prior"] else []
    marks += ["masked"] if first.get("mask") else []
    marks += [_count(first["references"], "reference")] if first.get("references") else []
    if marks:
        yield ", ".join(marks)
