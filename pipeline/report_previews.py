"""The pictures of a report: what the first step knew beside what the last one knows, and every step between.

Prompts that differ in the trigger alone stand in one row: what training taught shows with it, what leaked without it.
"""

import base64
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from flux2_relay.pipeline.charts import short
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.run_folder import RunFolder
from flux2_relay.stages.train.options import PromptOptions

_PNG = b"\x89PNG\r\n\x1a\n"
_SMALL = 192  # pixels; a picture below is enlarged without blurring it


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
    steps = sorted({step for _, step in found})
    pairs = trigger_pairs(config) if len(steps) > 1 else []
    shown = {number for pair in pairs for number in pair} if len(steps) == 2 else set()
    rest = sorted({number for number, _ in found} - shown)
    parts = [_undecoded(run, list(found.values())), _pairs(found, pairs, steps, config)]
    parts.append(_every_step(found, rest, steps, config) if rest else "")
    return "<h2>Previews</h2>\n" + "\n".join(filter(None, parts))


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
    rows = []
    for pair in pairs:
        wanted = [(number, step) for number in pair for step in ends]
        cells = "".join(f"<td>{_cell(found.get(one), prompts[one[0]].prompt)}</td>" for one in wanted)
        rows.append(f'<tr><th scope="row" class="prompt">{_prompt(prompts[pair[1]])}</th>{cells}</tr>')
    kinds = "with the trigger", "without it"
    heads = [_step_name(step, steps, config).replace("<small>", f"<small>{kind}, ") for kind in kinds for step in ends]
    return _table(heads, rows)


def _every_step(found: Found, numbers: Sequence[int], steps: Sequence[int], config: Config) -> str:
    prompts, rows = config.previews.pictures(), []
    for number in numbers:
        options = prompts[number] if number < len(prompts) else PromptOptions(prompt=f"prompt {number}")
        cells = "".join(f"<td>{_cell(found.get((number, step)), options.prompt)}</td>" for step in steps)
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


def _cell(preview: Preview | None, prompt: str) -> str:
    if preview is None or preview.picture is None:
        return f'<div class="none">{"not drawn" if preview is None else "not decoded yet"}</div>'
    data = preview.picture.read_bytes()
    if not data.startswith(_PNG) or len(data) < 24:
        return f'<div class="none">{escape(preview.picture.name)} is no PNG</div>'
    width, height = struct.unpack(">II", data[16:24])
    kind = ' class="small"' if max(width, height) < _SMALL else ""
    told = escape(f"{prompt}, step {preview.step}")
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img{kind} width="{width}" height="{height}" alt="{told}" src="{source}">'
