"""Starting ranks: the host file, the command line that ranks get, and how their ends become one."""

import json
import socket
import time
from pathlib import Path

import pytest
from tiny.project import relay

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.pipeline import launch, rank, signals

HOST = {"ssh": "mac1.local", "ips": ["10.0.0.1"]}


@pytest.mark.parametrize("told", [[HOST, HOST], {"backend": "ring", "envs": [], "hosts": [HOST, HOST]}])
def test_host_files_of_mlx_are_taken(tmp_path: Path, told: object) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(told))
    assert launch.read_hosts(path) == ["mac1.local"] * 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '["mac1"]', '{"hosts": 3}', '[{"ips": []}]', '[{"ssh": "one"}]'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"hosts\.json"):
        launch.read_hosts(path)
    with pytest.raises(InputError, match=r"hosts\.json"):
        launch.read_hosts(tmp_path / "hosts.json.none")


def test_ranks_get_the_command_without_what_started_them() -> None:
    given = ["train", "-c", "a.yaml", "--hosts", "h.json", "--set", "run.seed=1", "--port=7", "--max-steps", "3"]
    assert launch.without_own(given) == ["train", "-c", "a.yaml", "--set", "run.seed=1", "--max-steps", "3"]
    assert launch.without_own(["train", "--hosts=h", "--port", "9"]) == ["train"]


def test_a_port_without_hosts_and_a_wrong_config_are_refused_before_anything_starts(tmp_path: Path) -> None:
    outcome = relay("train", "-c", tmp_path / "none.yaml", "--port", 4000)
    assert (outcome.status, "--hosts" in outcome.said) == (2, True)
    outcome = relay("train", "-c", tmp_path / "none.yaml", "--hosts", tmp_path / "hosts.json")
    assert (outcome.status, "none.yaml" in outcome.said) == (2, True)


def test_all_ranks_well_is_well() -> None:
    launch.conclude({0: 0, 1: 0}, 2, 0)


ENDS = {
    "one was wrong, the other lost it": ({0: 1, 1: 2}, 2, InputError, "rank 1 of 2 ended with status 2"),
    "one was killed": ({0: 1}, 2, RelayError, "rank 1 of 2 ended without a word"),
    "one was killed at the very end": ({1: 0}, 2, RelayError, "rank 0 of 2 ended without a word"),
    "one failed": ({0: 0, 1: 1}, 2, RelayError, "rank 1 of 2 ended with status 1"),
    "none began": ({}, 0, RelayError, "no rank"),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_ranks_ended_is_how_the_launch_ends(name: str) -> None:
    ends, size, error, sentence = ENDS[name]
    with pytest.raises(error, match=sentence) as raised:
        launch.conclude(ends, size, 0)
    assert raised.value.exit_status == error.exit_status


def test_a_host_file_that_mlx_refuses_is_the_users_fault() -> None:
    with pytest.raises(InputError):
        launch.conclude({}, 0, 2)


@pytest.mark.parametrize("status", [signals.INTERRUPTED, signals.TERMINATED])
def test_ranks_that_were_told_to_leave_end_as_one_process_does(status: int) -> None:
    with pytest.raises(signals.Terminated) as raised:
        launch.conclude({0: status, 1: status}, 2, 0)
    assert raised.value.exit_status == status


@pytest.mark.parametrize(
    ("error", "status"),
    [(InputError("x"), 2), (RelayError("x"), 1), (ValueError(), 1), (KeyboardInterrupt(), 130),
     (signals.Terminated(143), 143)],
)  # fmt: skip
def test_a_rank_says_its_status_and_the_launch_reads_it(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flux2_relay.stages.train import ranks

    monkeypatch.setattr(ranks, "open_group", lambda waits: ranks.Group(1, 3))
    with pytest.raises(type(error)), rank.taking_part():
        raise error
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("rank 1 of 3 is process ")
    found = rank.ENDED.search(last)
    assert found
    assert found.groups() == ("1", "3", str(status))


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("is_open", [True, False])
def test_a_rank_that_was_told_to_leave_does_not_wait_for_ever(
    is_open: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for lost ranks nor, before there is a group, for such that never came."""
    from flux2_relay.stages.train import ranks

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(rank, "PATIENCE", -1)
    monkeypatch.setattr(rank.os, "_exit", leave)
    heard, told = socket.socketpair()
    waits = ranks.Waits(since=time.monotonic())
    with heard, told:
        told.send(bytes([15]))
        with pytest.raises(Left, match="143"):
            rank._leave_if_stuck(heard, waits, [ranks.Group(1, 2, None, waits)] if is_open else [])
    said = capsys.readouterr().out
    assert "was told to leave" in said
    assert ("rank 1 of 2 ended with status 143" in said) == is_open
