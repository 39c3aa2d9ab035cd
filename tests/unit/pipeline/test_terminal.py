"""What is printed fits a terminal of 80 columns, and every table can be had as JSON."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from flux2_relay.pipeline import cache_commands
from flux2_relay.pipeline.cli import cli, main

TABLES = ["init", "plan", "models", "check", "import", "bench"]


class Terminal(io.StringIO):
    """Eighty columns of it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # wins over the size of whatever the tests run in


def printed(*arguments: object, on: type[io.StringIO] = Terminal) -> str:
    with redirect_stdout(on()) as terminal, suppress(SystemExit):
        main(list(map(str, arguments)))
    return terminal.getvalue()


@pytest.mark.parametrize("name", [*TABLES, *(f"cache {name}" for name in cli.commands["cache"].commands)])  # pyright: ignore
def test_what_prints_a_table_prints_json(name: str) -> None:
    command = cli
    for word in name.split():
        command = command.commands[word]  # pyright: ignore
    assert any("--json" in option.opts for option in command.params)


@pytest.mark.usefixtures("eighty")
def test_entries_fit_and_are_whole_where_they_are_piped(encoded_store: Path) -> None:
    lines = printed("cache", "ls", "--store", encoded_store).splitlines()
    assert 40 < max(map(len, lines)) <= 80
    piped = printed("cache", "ls", "--store", encoded_store, on=io.StringIO)
    assert "…" not in piped
    assert "'a red fox number 1'" in piped
    assert json.loads(printed("cache", "ls", "--store", encoded_store, "--json"))["entries"]


@pytest.mark.usefixtures("eighty")
def test_the_catalogue_and_the_size_of_a_store_fit(encoded_store: Path) -> None:
    for arguments in (["models"], ["cache", "stats", "--store", encoded_store]):
        lines = printed(*arguments).splitlines()
        # A command is not broken, and neither is a path.
        assert not [line for line in lines if len(line) > 80 and "hf download" not in line and "/" not in line]


@pytest.mark.parametrize(("utf8", "status"), [("0", 2), ("1", 0)])
def test_a_locale_that_garbles_names_is_refused(utf8: str, status: int) -> None:
    """Else a folder whose name is not ASCII, and that is there, was said not to be."""
    garbling = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "flux2_relay.pipeline.cli", "models"]
    done = subprocess.run(command, env=garbling, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert ("run it with PYTHONUTF8=1" in done.stderr) == bool(status)
    assert "Traceback" not in done.stderr


def test_nothing_is_coloured(encoded_store: Path) -> None:
    for arguments in (["-h"], ["models"], ["cache", "stats", "--store", encoded_store], ["trian"]):
        for on in (Terminal, io.StringIO):
            assert "\x1b" not in printed(*arguments, on=on)


def test_a_bar_in_a_file_is_not_written_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)  # a command may have run in this process before
    loop = "import time; from tqdm import tqdm\nfor _ in tqdm(range(8)): time.sleep(0.11)"
    calm = "from flux2_relay.pipeline import cli; cli.calm_bars()\n"
    written = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stderr.count(b"\r")
        for code in (loop, calm + loop)
    ]
    assert written[0] >= 5 > 3 >= written[1] > 0


@pytest.mark.parametrize("name", list(cli.commands))
def test_help_fits(name: str) -> None:
    lines = printed(name, "-h", on=io.StringIO).splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("arguments", [["-h"], ["cache", "-h"]])
def test_the_list_of_commands_cuts_no_sentence(arguments: list[str]) -> None:
    assert "..." not in printed(*arguments, on=io.StringIO).split("Commands:")[1]


def test_the_list_of_commands_says_where_to_begin() -> None:
    said = printed("-h", on=io.StringIO)
    order = said.split("In this order")[1].split("Options")[0]
    for name in ("init", "plan", "encode", "train", "decode", "report"):
        assert f" {name} " in " ".join(order.replace(",", " ").split()) + " "
        assert f"\n  {name} " in said


def test_the_last_column_is_cut_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    with redirect_stdout(Terminal()) as terminal:
        cache_commands.print_table(["a", "b"], [["x" * 5, "y" * 50]], may_cut=True)
    assert terminal.getvalue().splitlines()[1] == f"{'x' * 5}  {'y' * 12}…"
    with redirect_stdout(io.StringIO()) as pipe:
        cache_commands.print_table(["a", "b"], [["x" * 5, "y" * 50]], may_cut=True)
    assert "y" * 50 in pipe.getvalue()
    assert sys.stdout is not terminal
