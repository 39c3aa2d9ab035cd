"""Several runs on one page: sorted, compared key by key, curves over each other, previews below each other."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from tiny.pages import HOSTILE, Page, held_out_line, png, put_preview, write_run
from tiny.project import relay

from flux2_relay.pipeline import comparison
from flux2_relay.pipeline.run_folder import open_run

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run with losses, held-out losses by step, and previews of one prompt."""

    def write(
        where: str,
        held: Mapping[int, float] | None = None,
        done: int = 4,
        prompts: Sequence[str] = ("a fox",),
        name: str = "",
    ) -> Path:
        folder = write_run(tmp_path / where, [1.0, 0.9, 0.8, 0.7][:done], 4, prompts, name=name)
        lines = "".join(held_out_line(step, loss) for step, loss in (held or {}).items())
        (folder / "validation.jsonl").write_text(lines)
        for step in (0, 4) if prompts else ():
            put_preview(folder, step, 0, png(16, 16, 10 * step))
        return folder

    return write


def page(*folders: Path) -> Page:
    return Page(comparison.write([open_run(folder) for folder in folders]).read_text("utf-8"))


def set_key(folder: Path, text: str) -> None:
    with open(folder / "config.yaml", "a") as file:
        file.write(text)


def rows(found: Page, html: str) -> list[str]:
    """The runs in the order of the first table."""
    body = html.partition("<tbody>")[2].partition("</tbody>")[0]
    return re.findall(r'<th scope="row" class=""><i class="swatch \w"></i>([^<]*)</th>', body)


def test_the_least_held_out_loss_comes_first(make: Make, tmp_path: Path) -> None:
    runs = [
        make("none"),
        make("rising", {0: 1.0, 2: 0.6, 4: 0.9}),
        make("best", {0: 1.0, 2: 0.7, 4: 0.5}),
        make("worst", {0: 1.0, 2: 0.95, 4: 0.97}),
    ]
    found = page(*runs)
    assert rows(found, found.html) == ["best", "rising", "worst", "none"]
    assert "best has the least held-out loss, 0.5; 1 of 4 held nothing out." in found.text
    assert re.search(r"rising ?0\.6000 ?2 ?1\.000", found.text)
    assert re.search("none ?not taken", found.text)
    assert "do not begin at the same" not in found.text
    assert (tmp_path / "comparison.html").exists()


def test_runs_judged_on_other_pictures_are_not_ranked_without_a_word(make: Make) -> None:
    assert (
        "do not begin at the same held-out loss" in page(make("a", {0: 1.0, 4: 0.5}), make("b", {0: 2.0, 4: 0.6})).text
    )


def test_without_held_out_pictures_the_loss_of_training_sorts(make: Make) -> None:
    found = page(make("short", done=2), make("long"))
    assert rows(found, found.html) == ["long", "short"]
    assert "Nothing was held out" in found.text


def test_what_differs_is_listed_and_nothing_else(make: Make) -> None:
    one, other = make("a"), make("b")
    set_key(one, "lora: {rank: 8, alpha: 8}\n")
    set_key(other, "lora: {rank: 4, alpha: 8}\nsave: {dtype: float32}\n")
    found = page(one, other)
    listed = re.findall(r'<th scope="row"><code>([^<]*)</code>', found.html)
    assert listed == ["lora.rank", "save.dtype"]
    same = page(make("d"), make("e"))
    assert "Nothing in the configs but the names of the runs." in same.text


def test_curves_lie_over_each_other_in_the_colours_of_the_table(make: Make) -> None:
    found = page(make("a", {0: 1.0, 4: 0.9}), make("b", {0: 1.0, 4: 0.5}))
    colours = dict(re.findall(r'class=""><i class="swatch (\w)"></i>(\w)<', found.html))
    for letter, name in colours.items():
        assert f'class="line {letter}" data-name="{name}"' in found.html
    labels = [re.split(",| over", svg["aria-label"])[0] for svg in found.all("svg")]
    assert labels == [
        "Held-out loss", "Held-out loss by sigma", "Loss", "Peak memory", "Gradient norm", "Learning rate", "Time"
    ]  # fmt: skip


def test_previews_stand_by_prompt_a_run_a_row(make: Make) -> None:
    one, other = make("a", prompts=("a fox", "a dog")), make("b", prompts=("a dog", "a fox"))
    put_preview(one, 4, 1, png(16, 16))
    found = page(one, other)
    names = [(image["data-row"], image["data-name"]) for image in found.all("img")]
    assert names == [
        ("a fox", "a, step 0"), ("a fox", "a, step 4"),
        ("a dog", "a, step 4"), ("a dog", "b, step 0"), ("a dog", "b, step 4"),
    ]  # fmt: skip
    slider = next(of for of in found.all("section") if of["class"] == "compare")
    assert (slider["data-left"], slider["data-right"]) == ("a, step 4", "b, step 4")


def test_other_steps_of_the_same_prompt_are_another_prompt(make: Make) -> None:
    one, other = make("a"), make("b")
    text = (other / "config.yaml").read_text().replace("size: [64, 96]", "size: [64, 96], steps: 3")
    (other / "config.yaml").write_text(text)
    found = page(one, other)
    assert [image["data-row"] for image in found.all("img")] == ["1. a fox"] * 2 + ["2. a fox"] * 2


def test_names_and_prompts_are_text(make: Make) -> None:
    one = make("a", {0: 1.0, 4: 0.5}, prompts=(HOSTILE,), name="<script>&")
    found = page(one, make("b", {0: 1.0, 4: 0.5}, prompts=(HOSTILE,)))
    found.asks_for_nothing()
    assert "<script>&" in found.text
    assert HOSTILE in found.text


def test_runs_of_one_name_are_told_by_their_folders(make: Make, tmp_path: Path) -> None:
    folders = make("x/fox"), make("y/fox")
    found = page(*folders)
    assert all(str(folder) in found.text for folder in folders)
    assert (tmp_path / "comparison.html").exists()  # above both


def test_runs_without_steps_or_previews_are_shown(make: Make) -> None:
    text = page(make("a", done=0, prompts=()), make("b", done=0, prompts=())).text
    assert "No step has been done yet." in text
    assert "None were drawn" in text


def test_the_command_writes_each_report_and_the_comparison(make: Make, tmp_path: Path) -> None:
    runs = make("a"), make("b")
    outcome = relay("report", *runs, "-o", tmp_path / "both.html")
    assert outcome.status == 0, outcome.said
    assert f"the comparison is {tmp_path / 'both.html'}" in outcome.said
    for run in runs:
        assert "4 of 4 steps done" in (run / "report.html").read_text("utf-8")
    assert "2 runs side by side" in (tmp_path / "both.html").read_text("utf-8")
    assert not (tmp_path / "comparison.html").exists()


def test_one_run_has_nothing_to_compare_with(make: Make, tmp_path: Path) -> None:
    run = make("a")
    assert "comparison" not in relay("report", run, run).said
    outcome = relay("report", run, "-o", tmp_path / "x.html")
    assert outcome.status == 2
    assert "-o names the page that compares runs" in outcome.said
