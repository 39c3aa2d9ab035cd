"""A run as one HTML page that needs nothing else: the verdict, the curves, the previews, the data, the config.

Only what lies in the run folder is read: neither model nor store, so that a page can be made anywhere.
"""

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from flux2_relay.pipeline import held_out, origin
from flux2_relay.pipeline.charts import short
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.page import page
from flux2_relay.pipeline.report_charts import curves, planned_bytes
from flux2_relay.pipeline.report_data import data_set
from flux2_relay.pipeline.report_metrics import Metrics, duration, in_bytes, read_metrics
from flux2_relay.pipeline.report_previews import find_previews, previews
from flux2_relay.pipeline.run_folder import RunFolder

_LOG_LINES = 200


def write_report(run: RunFolder, config: Config, live: bool = False) -> Path:
    """Write RUN/report.html, whole or not at all -> its path; a `live` page reloads itself."""
    metrics, held, made_from = read_metrics(run), held_out.read(run), origin.read(run)
    shown = [previews(run, config), curves(config, metrics, held, made_from)]
    has_pictures = any(preview.picture for preview in find_previews(run))
    parts = [
        f'<p class="kind">flux2-relay run</p>\n<h1>{escape(config.run.name)}</h1>',
        _verdict(run, config, metrics, live),
        _facts(run, metrics, made_from),
        *(shown if has_pictures else reversed(shown)),
        data_set(run, made_from),
        _about(run, config, made_from),
    ]
    return write_page(run.path / "report.html", f"{config.run.name}: flux2-relay run", "\n".join(parts), live)


def write_page(target: Path, title: str, body: str, live: bool = False) -> Path:
    """Write a page under its name in one step, whoever else writes it at the same time."""
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_text(page(title, body, live), "utf-8")
        os.replace(aside, target)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return target


def _verdict(run: RunFolder, config: Config, metrics: Metrics, live: bool) -> str:
    """What came of the run, in one line."""
    done, steps = metrics.done, config.train.steps
    finished = done >= steps and run.adapter.exists()
    said = [f"{done:,} of {steps:,} steps done"]
    if done:
        first, last = (short(float(f"{end:.4g}")) for end in metrics.ends())
        said.append(f"loss {first} → {last}, first to last fifth of the steps" if done > 1 else f"loss {first}")
    if (held := held_out.read(run)) is not None:
        said.append(held_out.in_words(held))
    if run.adapter.exists():
        said.append(f"adapter <code>{escape(str(run.adapter))}</code>")
    if live:
        said.append("training goes on")
    elif not finished:
        said.append(f"not finished: the same <code>relay train</code> goes on from step {_newest_checkpoint(run):,}")
    line = f'<p class="verdict{"" if finished else " open"}">{"; ".join(said)}</p>'
    return line + (_while_it_runs() if live else "")


def _while_it_runs() -> str:
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return (
        f'\n<p class="hint live">As of {now}. While the training goes on this page is written again at every preview, '
        "and reloads itself every minute that nobody touches it.</p>"
    )


def _newest_checkpoint(run: RunFolder) -> int:
    return max((int(path.name) for path in (run.path / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def _facts(run: RunFolder, metrics: Metrics, made_from: Mapping[str, Any]) -> str:
    """The figures that one looks for first."""
    if not metrics.done:
        return ""
    first, last = metrics.ends()
    busy, waited = float(metrics.seconds.sum()), float(metrics.wait_seconds.sum())
    planned = planned_bytes(made_from)
    facts = [
        ("Loss", f"{last:.3g}", f"{last / first - 1:+.0%} since the first fifth" if len(metrics.loss) > 4 else "mean"),
        ("Seconds a step", f"{np.median(metrics.seconds):.3g}", "median"),
        ("Waiting for data", f"{waited / (busy + waited or 1):.1%}", f"{duration(waited)} in all"),
        ("Time in steps", duration(busy + waited), "previews and checkpoints not counted"),
        (
            "Peak memory",
            in_bytes(metrics.peak_bytes.max()),
            "arrays held by MLX at once" if planned is None else f"planned {in_bytes(planned)}",
        ),
    ]
    if run.adapter.exists():
        facts.append(("Adapter", in_bytes(run.adapter.stat().st_size), "in diffusers names"))
    cells = (f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in facts)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _about(run: RunFolder, config: Config, made_from: Mapping[str, Any]) -> str:
    """Where the run came from, and its config and log, folded."""
    card = adapter_metadata(run.adapter)
    rows = {
        "Run folder": str(run.path),
        "Model": config.model.path,
        "Store": config.cache.path,
        "Set": _set_key(run) or card.get("flux2_relay.set", "unknown until the first checkpoint"),
        "Trained with": f"flux2-relay {card['flux2_relay.version']}" if "flux2_relay.version" in card else "",
        **dict(_made_from(made_from)),
        "Page by": f"flux2-relay {version('flux2-relay')}",
    }
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(told)}</code></td></tr>" for name, told in rows.items() if told
    )
    folded = _folded("Config", run.path / "config.yaml") + _folded("Log", run.path / "log.txt", _LOG_LINES)
    return f'<h2>About this run</h2>\n<table class="about">{cells}</table>\n{_models(run)}{folded}'


def _models(run: RunFolder) -> str:
    """What each model took that a stage of this run held: one at a time, and none left behind."""
    rows = "".join(_model(line) for line in run.phases() if isinstance(line, Mapping))
    names = "Model held", "for", "peak", "planned", "before", "after", "process after"
    head = "".join(
        f'<th scope="col" class="{"number" if place else ""}">{name}</th>' for place, name in enumerate(names)
    )
    table = f'<table class="table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll models">{table}</div>\n' if rows else ""


def _model(line: Mapping[str, Any]) -> str:
    sizes = ("peak_bytes", "predicted_bytes", "before_bytes", "after_bytes", "process_bytes")
    told = [duration(line["seconds"]) if _is_number(line.get("seconds")) else ""]
    told += [in_bytes(line[name]) if _is_number(line.get(name)) else "" for name in sizes]
    cells = "".join(f'<td class="number">{value}</td>' for value in told)
    return f'<tr><th scope="row">{escape(str(line.get("name")))}</th>{cells}</tr>'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value >= 0


def _made_from(made_from: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What origin.json says of model, set and machine, as far as it is whole."""
    model, of_set = _mapping(made_from, "model"), _mapping(made_from, "set")
    sizes, made = _mapping(model, "transformer"), _mapping(of_set, "made")
    if sizes:
        name = f"{model['name']}, " if model.get("name") else ""
        blocks = f"{sizes.get('double_blocks')} + {sizes.get('single_blocks')} blocks"
        yield "Transformer", f"{name}{blocks}, {'distilled' if model.get('distilled') else 'not distilled'}"
    for part, key in _mapping(of_set, "identities").items():
        yield f"{'VAE' if part == 'vae' else str(part).capitalize()} key", str(key)
    encoded = [f"flux2-relay {made['version']}"] if "version" in made else []
    encoded += [f"MLX {made['mlx']}"] if "mlx" in made else []
    encoded += [_device(made["device"])] if "device" in made else []
    encoded += [_moment(made["at"])] if "at" in made else []
    yield "Encoded with", ", ".join(encoded)
    yield "Versions", ", ".join(f"{name} {number}" for name, number in _mapping(made_from, "versions").items())
    yield "Machine", ", ".join(map(_device, _mapping(made_from, "machine").values()))
    yield "Plan", str(_mapping(made_from, "plan").get("in_words", ""))


def _device(told: object) -> str:
    """MLX's name of a device as people write it: Device(cpu, 0) is CPU; anything else stays."""
    found = re.fullmatch(r"Device\((\w+), (\d+)\)", str(told))
    return str(told) if found is None else found[1].upper() + (f" {found[2]}" if found[2] != "0" else "")


def _moment(told: object) -> str:
    """A time of ISO 8601 to the minute, in UTC; anything else stays."""
    try:
        return datetime.fromisoformat(str(told)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(told)


def _mapping(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = of.get(name)
    return value if isinstance(value, Mapping) else {}


def _folded(title: str, path: Path, last: int | None = None) -> str:
    if not path.exists():
        return ""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    text = "\n".join(lines if last is None else lines[-last:])
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>\n"


def _set_key(run: RunFolder) -> str | None:
    """The key of the set in the store that the newest checkpoint was trained on."""
    try:
        state = (run.path / "checkpoints" / f"{_newest_checkpoint(run):06d}" / "state.json").read_text("utf-8")
        return str(json.loads(state)["set"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def adapter_metadata(path: Path) -> Mapping[str, str]:
    """What an adapter file says of itself; nothing where there is none or it cannot be read."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        return {str(name): str(value) for name, value in header["__metadata__"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}
