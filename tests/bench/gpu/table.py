"""The figures of a run as a Markdown table, each beside what was asked of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.gpu.cases import Case

HEAD = "| case | seconds | peak GiB | planned GiB | how | asked for | reached |\n|---|---|---|---|---|---|---|"


def markdown(lines: Sequence[Mapping[str, Any]], cases: Mapping[str, Case]) -> str:
    """Machine and command, then a row a case; of a case run more than once the last run that worked."""
    about = [_about(line) for line in lines if "machine" in line]
    found: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if "case" in line and ("error" not in line or line["case"] not in found):
            found[line["case"]] = line
    rows = [_row(cases[name], found) for name in cases if name in found]
    return "\n".join([*about, "", HEAD, *rows])


def listing(cases: Iterable[Case]) -> str:
    """Every case with the seconds that it takes."""
    return "\n".join(f"{case.name:32} about {case.expected_seconds:3.0f} s" for case in cases)


def brief(line: Mapping[str, Any]) -> str:
    """One case in one line, for who is waiting."""
    if "error" in line:
        return f"FAILED: {line['error']}"
    figures = {name: line[name] for name in ("seconds", "peak_gib", "predicted_gib", "ratio") if name in line}
    return ", ".join(f"{name} {value}" for name, value in figures.items())


def _about(line: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in line["versions"].items())
    size = "TINY MODELS; " if line["tiny"] else ""
    where = f"{size}{line['machine']}, {line['cores']} cores; {versions}"
    return f"{where}; commit {line['commit']}, {line['when']}; `{line['command']}`"


def _row(case: Case, found: Mapping[str, Mapping[str, Any]]) -> str:
    line = found[case.name]
    if "error" in line:
        said = " ".join(str(line["error"]).split())[:160].replace("|", "/")
        return f"| {case.name} | | | | failed: {said} | | |"
    asked = list(_asked(case, line, found))
    cells = [
        case.name,
        _number(line.get("seconds")),
        _number(line.get("peak_gib")),
        _number(line.get("predicted_gib")),
        _how(line),
        "; ".join(text for text, _ in asked),
        "; ".join(text for _, text in asked),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _how(line: Mapping[str, Any]) -> str:
    """What was decided, in a few words."""
    if "how" in line:
        return str(line["how"])
    parts = [f"{line['bits']} bit", f"{line['resident']} blocks resident", f"{line['keep']} kept"]
    if "loader_gib_s" in line:
        parts.append(
            f"reading alone {line['loader_seconds']} s ({line['loader_gib_s']} GiB/s), "
            f"computing alone {line['compute_seconds']} s"
        )
    if "memory_growth" in line:
        parts.append(f"memory x {line['memory_growth']}, step x {line['ratio']} from first to last part")
    return ", ".join(parts)


def _asked(case: Case, line: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """(what was asked for, what was reached) of every goal that can be judged."""
    goal, seconds = case.goal, line.get("seconds", 0.0)
    for name, unit, limit in (
        ("seconds", "s", goal.seconds),
        ("peak_gib", "GiB", goal.gib),
        ("ratio", "x", goal.ratio),
    ):
        if limit is not None and line.get(name) is not None:
            yield f"≤ {limit:g} {unit}", _verdict(line[name] <= limit, f"{line[name]:.3g} {unit}")
    for limits, is_least in ((goal.faster_than, True), (goal.slower_at_most, False)):
        for other, limit in limits.items():
            theirs = found.get(other, {}).get("seconds")
            if theirs is None or not seconds:
                continue
            ratio = theirs / seconds if is_least else seconds / theirs
            sign, said = ("≥", "the speed of") if is_least else ("≤", "the time of")
            yield (
                f"{sign} {limit:g} x {said} {other}",
                _verdict((ratio >= limit) is is_least or ratio == limit, f"{ratio:.2f} x"),
            )


def _verdict(is_met: bool, text: str) -> str:
    return f"{'yes' if is_met else '**no**'}, {text}"
