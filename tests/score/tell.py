"""Put the newest figures of `make score` and `make torture` into docs/nano.md: python tests/score/tell.py

They come from runs/score.json, which both write; what stands between the two marks of the page is replaced.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from score import scores
from score.prompts import ROOT

PAGE = ROOT / "docs/nano.md"
START, END = "<!-- from runs/score.json, by tests/score/tell.py -->\n", "<!-- to here -->\n"


def told(page: str, found: dict) -> str:
    """The page with these figures in it."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    lines = scores.table(found["rows"], found["facts"])
    about = f"Model, lesson and settings {found['made_by']}; {found['machine']}."
    return "\n".join([before + START, about, "", *lines, "", END + after])


if __name__ == "__main__":
    PAGE.write_text(told(PAGE.read_text("utf-8"), json.loads(scores.FILE.read_text("utf-8"))), "utf-8")
