"""A training on several machines or GPUs: the same command as one rank at every host of a file, by `mlx.launch`.

The file is MLX's own: `[{"ssh": HOST, "ips": [ADDRESS]}, …]`, or a mapping with `backend`, `envs` and `hosts`. What
`mlx.launch` does not do is done here: it ends with 0 whatever its processes ended with, and leaves them behind where it
is stopped itself.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.pipeline import rank, signals

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OPTIONS = ("--hosts", "--port")


def on_hosts(command: Callable[..., None]) -> Callable[..., None]:
    """`--hosts FILE` and `--port N` for a command on a config: it then runs at every host, and here not at all."""

    @click.option("--hosts", type=click.Path(path_type=Path), help="Train on all hosts of this file of `mlx.launch`.")
    @click.option("--port", type=click.IntRange(1, 65535), help="The first port that ranks of --hosts listen on.")
    @functools.wraps(command)
    def wrapped(hosts: Path | None, port: int | None, **options: object) -> None:
        if hosts is None:
            if port is not None:
                raise click.UsageError("--port says where the ranks of --hosts listen; name those, too.")
            command(**options)
            return
        from flux2_relay.pipeline import sweep

        given = options["config_files"], options["settings"], options["sweeps"]
        if len(sweep.expand(*given)) > 1:  # pyright: ignore[reportArgumentType]
            raise InputError("--hosts trains one run; of a sweep, give each run its own command")
        run(hosts, without_own(sys.argv[1:]), port)

    return wrapped


def without_own(arguments: Sequence[str]) -> list[str]:
    """A command line without the options of `on_hosts`."""
    kept: list[str] = []
    given = iter(arguments)
    for argument in given:
        if argument in _OPTIONS:
            next(given, None)
        elif argument.partition("=")[0] not in _OPTIONS:
            kept.append(argument)
    return kept


def run(hosts: Path, arguments: Sequence[str], port: int | None) -> None:
    """Start `relay ARGUMENTS` at every host and wait for all; the worst end of a rank is the end of this process.

    `port`: the first one that ranks listen on; None leaves it to `mlx.launch`.
    """
    names = read_hosts(hosts)
    if "MLX_RANK" in os.environ:
        raise InputError("--hosts starts the ranks itself; leave it out under `mlx.launch`")
    ports = [] if port is None else ["--starting-port", str(port), "--nccl-port", str(port)]
    gpus = ["--repeat-hosts", str(max(map(names.count, names)))]  # over NCCL it counts the GPUs of a host by this alone
    command = [sys.executable, "-m", "flux2_relay.pipeline.cli", *arguments]
    process = subprocess.Popen(
        [_launcher(), "--hostfile", str(hosts), *ports, *gpus, "--", *command],
        stdin=subprocess.PIPE,  # never written to: it would read from a closed one without end
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_ignore,  # the ranks obey, and it waits for them
    )
    assert process.stdout is not None
    ends: dict[int, int] = {}
    size = 0
    with process, _handing_on(process):
        for line in process.stdout:
            click.echo(line, nl=False)
            if found := rank.ENDED.search(line):
                number, size, status = map(int, found.groups())
                ends[number] = status
        status = process.wait()
    conclude(ends, size, status)


def read_hosts(path: Path) -> list[str]:
    """The machines that a host file names, one a rank; InputError where it is none, or names no two ranks."""
    try:
        told = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: this host file cannot be read ({error})") from None
    hosts = told.get("hosts") if isinstance(told, Mapping) else told
    if not isinstance(hosts, list) or not hosts or not all(isinstance(h, Mapping) and "ssh" in h for h in hosts):
        raise InputError(
            f'{path}: is no host file; it takes a list like [{{"ssh": "mac1.local", "ips": ["10.0.0.1"]}}, …], as '
            "`mlx.distributed_config` writes it"
        )
    if len(hosts) < 2:
        raise InputError(f"{path}: names one rank; leave --hosts out, or name a machine once for each of its GPUs")
    return [str(host["ssh"]) for host in hosts]


def _launcher() -> str:
    """MLX's own, of this Python if it is there."""
    beside = Path(sys.executable).with_name("mlx.launch")
    found = str(beside) if beside.exists() else shutil.which("mlx.launch")
    if found is None:
        raise RelayError(
            "mlx.launch was not found; it comes with the mlx package, see that its scripts are on the PATH"
        )
    return found


def _ignore() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handing_on(process: subprocess.Popen[str]) -> Iterator[None]:
    """Signals to this process go to the ranks on this machine; they tell the others, finish the step and leave."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.killpg(process.pid, number)

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def conclude(ends: Mapping[int, int], size: int, launcher: int) -> None:
    """End as the ranks did: quietly where all ended with 0.

    `ends`: rank -> exit status of those that said it; `size` of their group; `launcher` the status of `mlx.launch`.
    """
    if not ends:
        error = InputError if launcher == InputError.exit_status else RelayError
        raise error("no rank came to its end; what happened stands above")
    lost = [number for number in range(size) if number not in ends]
    failed = sorted((status, number) for number, status in ends.items() if status)
    if not lost and not failed:
        return
    wrong = [number for status, number in failed if status == InputError.exit_status]
    if wrong:
        raise InputError(f"rank {wrong[0]} of {size} ended with status {InputError.exit_status}; why stands above")
    if lost:
        names = " and ".join(map(str, lost))
        raise RelayError(
            f"rank {names} of {size} ended without a word, as one does that is killed; what is known stands above"
        )
    if all(status in (signals.INTERRUPTED, signals.TERMINATED) for status, _ in failed):
        raise signals.Terminated(failed[0][0])
    raise RelayError(f"rank {failed[0][1]} of {size} ended with status {failed[0][0]}; why stands above")
