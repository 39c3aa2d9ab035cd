"""Several runs on one page: figures sorted by held-out loss, what differs in their configs, curves over each other.

The previews of each prompt stand one run below another, with a slider over any two.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from flux2_relay.pipeline import charts, held_out
from flux2_relay.pipeline.charts import COLOURS, Chart, Colour, Series, figure
from flux2_relay.pipeline.config import Config, flat
from flux2_relay.pipeline.held_out import HeldOut
from flux2_relay.pipeline.report import write_page
from flux2_relay.pipeline.report_charts import window
from flux2_relay.pipeline.report_metrics import Metrics, duration, in_bytes, read_metrics, scaled_bytes
from flux2_relay.pipeline.report_previews import Preview, cell, compare, find_previews, row_names, spread
from flux2_relay.pipeline.run_folder import RunFolder
from flux2_relay.stages.train.options import PromptOptions

_MOST_STEPS, _MOST_PIXELS = 6, 448  # of previews: columns, and the longer side of a picture
_SAME_START = 0.01
"""Relative difference of held-out losses before training up to which two runs are judged alike."""
_OWN = {"run.name", "run.dir"}  # differ in any two runs and say nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run as the page has it."""

    folder: RunFolder
    config: Config
    label: str
    colour: Colour
    metrics: Metrics
    held: HeldOut | None

    @property
    def best(self) -> float:
        """What runs are sorted by: the least held-out loss after a step, infinite where nothing was held out."""
        return min(self.held.loss[self.held.step > 0], default=np.inf) if self.held is not None else np.inf

    @property
    def last_loss(self) -> float:
        """The mean loss of the last fifth of the steps."""
        return self.metrics.ends()[1] if self.metrics.done else np.inf


def write(given: Sequence[tuple[RunFolder, Config]], target: Path | None = None) -> Path:
    """Write the page that compares these runs, comparison.html beside their folders unless told otherwise."""
    if target is None:
        target = _above(list(dict.fromkeys(run.path.parent for run, _ in given))) / "comparison.html"
    runs = _read(given)
    parts = [
        f'<p class="kind">flux2-relay</p>\n<h1>{len(runs)} runs side by side</h1>',
        _verdict(runs),
        _table(runs),
        _differences(runs),
        _curves(runs),
        _previews(runs),
    ]
    return write_page(target, f"{len(runs)} runs: flux2-relay", "\n".join(filter(None, parts)))


def _above(parents: Sequence[Path]) -> Path:
    """The folder that holds all of these, as it was named where it is one."""
    return parents[0] if len(parents) == 1 else Path(os.path.commonpath([path.absolute() for path in parents]))


def _read(given: Sequence[tuple[RunFolder, Config]]) -> list[Run]:
    """The runs, the best first; each keeps its colour and its name all over the page."""
    names = [config.run.name for _, config in given]
    found = [
        Run(
            folder=run,
            config=config,
            label=config.run.name if names.count(config.run.name) == 1 else str(run.path),
            colour=COLOURS[place % len(COLOURS)],
            metrics=read_metrics(run),
            held=held_out.read(run),
        )
        for place, (run, config) in enumerate(given)
    ]
    return sorted(found, key=lambda run: (run.best, run.last_loss))


def _verdict(runs: Sequence[Run]) -> str:
    """Which is best, and whether that can be said."""
    judged = [run for run in runs if np.isfinite(run.best)]
    if not judged:
        return (
            '<p class="verdict open">Nothing was held out (<code>validation.fraction</code>): compare by the previews, '
            "losses of training say little.</p>"
        )
    best = judged[0]
    said = f"<b>{escape(best.label)}</b> has the least held-out loss, {best.best:.4g}"
    if len(judged) < len(runs):
        said += f"; {len(runs) - len(judged)} of {len(runs)} held nothing out"
    doubt = "" if _are_alike(judged) else _UNLIKE
    return f'<p class="verdict{" open" if doubt else ""}">{said}.{doubt}</p>'


_UNLIKE = (
    " But these runs do not begin at the same held-out loss, so they were not judged on the same pictures, noise and "
    "model: compare each with its own beginning."
)


def _are_alike(judged: Sequence[Run]) -> bool:
    """Before the first step adapters change nothing: equal pictures, noise and model have equal losses."""
    starts = [run.held.loss[0] for run in judged if run.held is not None]
    counts = {(run.held.pictures, tuple(run.held.sigma)) for run in judged if run.held is not None}
    return len(counts) == 1 and max(starts) - min(starts) <= _SAME_START * max(starts)


def _table(runs: Sequence[Run]) -> str:
    names = (
        "Run",
        "Held-out loss",
        "at step",
        "before",
        "Loss",
        "Steps",
        "A step",
        "In steps",
        "Peak memory",
        "Adapter",
    )
    kinds = ["", *["number"] * (len(names) - 1)]
    columns = zip(names, kinds, strict=True)
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in columns)
    rows = "".join(f"<tr>{_name(run)}{''.join(map(_number, _figures(run)))}</tr>" for run in runs)
    note = '<p class="hint">Sorted by held-out loss at its least; loss is the mean of the last fifth of the steps.</p>'
    return f"{_scrolled(f'<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>')}{note}"


def _scrolled(table: str) -> str:
    return f'<h2>Figures</h2>\n<div class="scroll"><table class="table">{table}</table></div>'


def _name(run: Run, kind: str = "") -> str:
    return f'<th scope="row" class="{kind}"><i class="swatch {run.colour}"></i>{escape(run.label)}</th>'


def _number(value: str) -> str:
    return f'<td class="number">{escape(value)}</td>'


def _figures(run: Run) -> Iterator[str]:
    if run.held is not None and np.isfinite(run.best):
        after = run.held.step > 0
        yield f"{run.best:#.4g}"
        yield f"{int(run.held.step[after][np.argmin(run.held.loss[after])]):,}"
        yield f"{run.held.loss[0]:#.4g}"
    else:
        yield from ("not taken", "", "")
    metrics = run.metrics
    if not metrics.done:
        yield from ("", f"0 of {run.config.train.steps:,}", "", "", "", "")
        return
    yield f"{run.last_loss:#.3g}"
    yield (
        f"{metrics.done:,}"
        if metrics.done >= run.config.train.steps
        else f"{metrics.done:,} of {run.config.train.steps:,}"
    )
    yield f"{np.median(metrics.seconds):#.3g} s"
    yield duration(float(metrics.seconds.sum() + metrics.wait_seconds.sum()))
    yield in_bytes(metrics.peak_bytes.max())
    yield in_bytes(run.folder.adapter.stat().st_size) if run.folder.adapter.exists() else "none yet"


def _differences(runs: Sequence[Run]) -> str:
    """Every key of the configs whose values are not the same in all."""
    values = [flat(run.config) for run in runs]
    keys = [key for key in values[0] if key not in _OWN and len({_said(of.get(key)) for of in values}) > 1]
    if not keys:
        return '<h2>What differs</h2>\n<p class="hint">Nothing in the configs but the names of the runs.</p>'
    head = "".join(f'<th scope="col"><i class="swatch {run.colour}"></i>{escape(run.label)}</th>' for run in runs)
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        + "".join(f'<td class="wrap"><code>{escape(_said(of.get(key)))}</code></td>' for of in values)
        + "</tr>"
        for key in keys
    )
    table = f'<table class="table"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<h2>What differs</h2>\n<div class="scroll">{table}</div>'


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _curves(runs: Sequence[Run]) -> str:
    """The curves over each other, smoothed."""
    under_way = [run for run in runs if run.metrics.done]
    if not under_way:
        return '<h2>Curves</h2>\n<p class="hint">No step has been done yet.</p>'
    figures = [figure(_chart("Loss", "smoothed loss", under_way, "loss"), "wide")]
    if judged := [run for run in runs if run.held is not None]:
        figures = [figure(_held_out(judged), "wide"), figure(_by_sigma(judged), "tall"), *figures]
    figures.append(figure(_memory(under_way), "tall"))
    named = ("Gradient norm", "grad_norm"), ("Learning rate", "lr"), ("Time", "seconds")
    units = {"grad_norm": "smoothed, before clipping", "lr": "", "seconds": "smoothed seconds a step"}
    figures += [figure(_chart(title, units[name], under_way, name)) for title, name in named]
    return f'<h2>Curves</h2>\n<div class="charts">\n{"".join(figures)}</div>'


def _chart(title: str, unit: str, runs: Sequence[Run], name: str) -> Chart:
    series = []
    for run in runs:
        values = getattr(run.metrics, name)
        drawn = values if name == "lr" else charts.smooth(values, window(len(values)))
        series.append(Series(x=run.metrics.step, y=drawn, name=run.label, colour=run.colour))
    size = (740, 300) if name == "loss" else (320, 200)
    return Chart(title=title, x_label="step", y_label=unit, series=series, size=size, from_zero=name != "loss")


def _held_out(runs: Sequence[Run]) -> Chart:
    series = [
        Series(x=run.held.step, y=run.held.loss, name=run.label, style="dots", colour=run.colour)
        for run in runs
        if run.held is not None
    ]
    return Chart(title="Held-out loss", x_label="step", y_label="loss", series=series, size=(740, 300))


def _by_sigma(runs: Sequence[Run]) -> Chart:
    """Each run where its held-out loss is least."""
    series = [
        Series(
            x=run.held.sigma,
            y=run.held.by_sigma[int(np.argmin(run.held.loss))],
            name=run.label,
            style="dots",
            colour=run.colour,
        )
        for run in runs
        if run.held is not None
    ]
    return Chart(
        title="Held-out loss by sigma, each at its best",
        x_label="sigma (0 data, 1 noise)",
        y_label="loss",
        series=series,
        size=(370, 309),
        x_range=(0.0, 1.0),
    )


def _memory(runs: Sequence[Run]) -> Chart:
    size, unit = scaled_bytes(np.concatenate([run.metrics.peak_bytes for run in runs]))
    series = [
        Series(x=run.metrics.step, y=run.metrics.peak_bytes / size, name=run.label, colour=run.colour) for run in runs
    ]
    return Chart(
        title="Peak memory", x_label="step", y_label=f"{unit} so far", series=series, size=(370, 309), from_zero=True
    )


Found = dict[tuple[int, int], Preview]


def _previews(runs: Sequence[Run]) -> str:
    """For each prompt a row for each run; prompts are the same where their words, size, seed and so on are."""
    found: list[Found] = [{(one.number, one.step): one for one in find_previews(run.folder)} for run in runs]
    if not any(found):
        return '<h2>Previews</h2>\n<p class="hint">None were drawn (<code>previews.prompts</code>).</p>'
    steps = spread(sorted({step for of in found for _, step in of}), _MOST_STEPS)
    names = row_names(list(dict.fromkeys(prompt for run in runs for prompt in run.config.previews.pictures())))
    bodies = [_of_prompt((prompt, name), runs, found, steps) for prompt, name in names.items()]
    head = "".join(f'<th scope="col">step {step:,}</th>' for step in steps)
    table = f'<table class="previews"><thead><tr><th></th>{head}</tr></thead>{"".join(bodies)}</table>'
    hint = '<p class="hint">Some are not decoded yet: <code>relay decode RUN…</code> does it.</p>\n'
    waiting = any(one.picture is None for of in found for one in of.values())
    newest = [_newest(run, of) for run, of in zip(runs, found, strict=True)]
    return f'<h2>Previews</h2>\n{hint if waiting else ""}{compare(*newest[:2])}\n<div class="scroll">{table}</div>'


def _newest(run: Run, of: Found) -> str:
    return _shown(run, max((step for _, step in of), default=0))


def _shown(run: Run, step: int) -> str:
    return f"{run.label}, step {step}"


def _of_prompt(
    prompt: tuple[PromptOptions, str], runs: Sequence[Run], found: Sequence[Found], steps: Sequence[int]
) -> str:
    """The rows of one prompt: a run's own number of it finds its pictures."""
    options, name = prompt
    rows = []
    for run, of in zip(runs, found, strict=True):
        prompts = run.config.previews.pictures()
        number = prompts.index(options) if options in prompts else -1
        if any(number == drawn for drawn, _ in of):
            pictures = [(of.get((number, step)), step) for step in steps]
            cells = (
                cell(one, f"{name}, {_shown(run, step)}", (name, _shown(run, step), 0), _MOST_PIXELS)
                for one, step in pictures
            )
            rows.append(f"<tr>{_name(run, 'which')}{''.join(f'<td>{inner}</td>' for inner in cells)}</tr>")
    title = f'<tr class="run"><th scope="colgroup" colspan="{len(steps) + 1}"><span>{escape(name)}</span></th></tr>'
    return f"<tbody>{title}{''.join(rows)}</tbody>" if rows else ""
