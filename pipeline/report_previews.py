"""The pictures of a report: what the first step knew beside what the last one knows, and every step between.

Prompts that differ in the trigger alone stand in one row: what training taught shows with it, what leaked without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from flux2_relay.pipeline.charts import short
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.report_pictures import embedded
from flux2_relay.pipeline.run_folder import RunFolder
from flux2_relay.stages.train.options import PromptOptions

MOST_STEPS = 10
"""Steps that have a column; of more, evenly spread ones are shown, first and last among them."""
_MOST_PIXELS = 640  # of a picture's longer side


@dataclass(frozen=True, slots=True)
class Preview:
    """One preview of the folder: which prompt, which step, and its picture where there is one that is current."""

    number: int
    step: int
    picture: Path | None


def find_previews(run: RunFolder) -> Iterator[Preview]:
    """The previews of a run; a picture older than its latents is of an earlier try and does not count."""
    for latents in sorted((run.path / "previews").glob("*.safetensors")):
        step, _, number = latents.stem.partition("-")
        if step.isdigit() and number.isdigit():
            picture = latents.with_suffix(".png")
            current = picture.exists() and picture.stat().st_mtime_ns >= latents.stat().st_mtime_ns
            yield Preview(int(number), int(step), picture if current else None)


Found = Mapping[tuple[int, int], Preview]
"""Previews by (prompt number, step)."""


def previews(run: RunFolder, config: Config) -> str:
    """Pairs of prompts before and after training, then a row for each prompt and a column for each step."""
    found = {(preview.number, preview.step): preview for preview in find_previews(run)}
    if not found:
        return '<h2>Previews</h2>\n<p class="hint">None were drawn (<code>previews.prompts</code>).</p>'
    every = sorted({step for _, step in found})
    steps = spread(every)
    pairs = trigger_pairs(config) if len(steps) > 1 else []
    shown = {number for pair in pairs for number in pair} if len(steps) == 2 else set()
    rest = sorted({number for number, _ in found} - shown)
    parts = [_undecoded(run, list(found.values())), _left_out(run, steps, every)]
    parts += [compare(), _pairs(found, pairs, steps, config)]
    parts.append(_every_step(found, rest, steps, config) if rest else "")
    return "<h2>Previews</h2>\n" + "\n".join(filter(None, parts))


def compare(left: str = "", right: str = "") -> str:
    """The slider over two pictures of the page; a script fills it with those that say `data-row` and `data-name`.

    `left` and `right` are the names that it shows first, where they are there; else a row's first and last.
    """
    return f"""<section class="compare" aria-label="Two pictures, one over the other" hidden
data-left="{escape(left)}" data-right="{escape(right)}">
<div class="choice"><label>Prompt <select></select></label> <label>Left <select></select></label>
<label>Right <select></select></label> <q></q>
<p class="hint">Drag the line, or press the arrow keys. A click on a picture below brings it here.</p></div>
<div class="stage"><span></span><span></span>
<input type="range" min="0" max="100" step="1" value="50" aria-label="Where left ends and right begins"></div>
</section>"""


def spread(steps: Sequence[int], most: int = MOST_STEPS) -> list[int]:
    """At most `most` of these, evenly spread, first and last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def _left_out(run: RunFolder, steps: Sequence[int], every: Sequence[int]) -> str:
    if len(steps) == len(every):
        return ""
    where = f"<code>{escape(str(run.path / 'previews'))}</code>"
    return f'<p class="hint">Of {len(every)} steps {len(steps)} are shown; all are in {where}.</p>'


def trigger_pairs(config: Config) -> list[tuple[int, int]]:
    """Numbers of the prompts that start with a trigger, each with that of the same prompt without it."""
    prompts = config.previews.pictures()
    pairs = []
    for trigger in {data.trigger for data in config.data if data.trigger}:
        for number, picture in enumerate(prompts):
            bare = replace(picture, prompt=picture.prompt.removeprefix(f"{trigger} "))
            if bare != picture and bare in prompts:
                pairs.append((number, prompts.index(bare)))
    return sorted(pairs)


def _pairs(found: Found, pairs: Sequence[tuple[int, int]], steps: Sequence[int], config: Config) -> str:
    """A row for each pair: with the trigger before and after, without it before and after."""
    if not pairs:
        return ""
    ends, prompts = (steps[0], steps[-1]), config.previews.pictures()
    names = row_names(prompts)
    rows = []
    for pair in pairs:
        wanted = [(number, step) for number in pair for step in ends]
        cells = "".join(f"<td>{_cell(found.get(one), prompts[one[0]], names)}</td>" for one in wanted)
        rows.append(f'<tr><th scope="row" class="prompt">{_prompt(prompts[pair[1]])}</th>{cells}</tr>')
    kinds = "with the trigger", "without it"
    heads = [_step_name(step, steps, config).replace("<small>", f"<small>{kind}, ") for kind in kinds for step in ends]
    return _table(heads, rows)


def _every_step(found: Found, numbers: Sequence[int], steps: Sequence[int], config: Config) -> str:
    prompts, rows = config.previews.pictures(), []
    names = row_names(prompts)
    for number in numbers:
        options = prompts[number] if number < len(prompts) else PromptOptions(prompt=f"prompt {number}")
        cells = "".join(f"<td>{_cell(found.get((number, step)), options, names)}</td>" for step in steps)
        rows.append(f'<tr><th scope="row" class="prompt">{_prompt(options)}</th>{cells}</tr>')
    return _table([_step_name(step, steps, config) for step in steps], rows)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    table = f'<table class="previews"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _undecoded(run: RunFolder, found: Sequence[Preview]) -> str:
    waiting = sum(preview.picture is None for preview in found)
    if not waiting:
        return ""
    counted = f"{waiting} of {len(found)} previews are not decoded yet"
    command = f"<code>relay decode {escape(str(run.path))}</code>"
    return f'<p class="hint">{counted}: run {command}, then <code>relay report</code> again.</p>'


def _prompt(options: PromptOptions) -> str:
    told = [f"without: {options.negative}"] if options.negative else []
    if options.size:
        told.append(f"{options.size[0]} x {options.size[1]}, {options.steps} steps")
        told.append(f"guidance {short(options.guidance or 0)}, seed {options.seed}")
    return escape(options.prompt or "(empty prompt)") + "".join(f"<small>{escape(line)}</small>" for line in told)


def _step_name(step: int, steps: Sequence[int], config: Config) -> str:
    kind = "before training" if step == 0 else "final" if step == config.train.steps else ""
    if not kind and step == steps[-1]:
        kind = "newest"
    return f"step {step:,}<small>{kind or '&nbsp;'}</small>"


def row_names(prompts: Sequence[PromptOptions]) -> Mapping[PromptOptions, str]:
    """What the slider calls each: its words, and its number where others have the same."""
    words = [prompt.prompt or "(empty prompt)" for prompt in prompts]
    return {
        prompt: said if words.count(said) == 1 else f"{number}. {said}"
        for number, (prompt, said) in enumerate(zip(prompts, words, strict=True), 1)
    }


def _cell(preview: Preview | None, prompt: PromptOptions, names: Mapping[PromptOptions, str]) -> str:
    if preview is None:
        return _none()
    step, row = preview.step, names.get(prompt, prompt.prompt)
    return cell(preview, f"{prompt.prompt}, step {step}", (row, f"step {step}", step))


def cell(preview: Preview | None, told: str, shown: tuple[str, str, int], most: int = _MOST_PIXELS) -> str:
    """What stands in a table for one preview; `shown` is what the slider calls its row and it, and its place there."""
    if preview is None or preview.picture is None:
        return _none("not drawn" if preview is None else "not decoded yet")
    picture = embedded(preview.picture, most)
    if picture is None:
        return _none(f"{preview.picture.name} is no PNG")
    row, name, order = shown
    return picture.img(told, f' data-row="{escape(row)}" data-name="{escape(name)}" data-order="{order}"')


def _none(why: str = "not drawn") -> str:
    return f'<div class="none">{escape(why)}</div>'
