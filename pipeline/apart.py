"""Work in a process of its own, so that what it held is gone when the next one starts: one model after another.

The process is a fresh one (not a fork): it imports what its work needs and nothing else. What it returns comes back,
and an error of the house is raised here as if it had happened here.
"""

import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

from flux2_relay.cache.errors import RelayError
from flux2_relay.pipeline import signals

Result = TypeVar("Result")


def run(work: Callable[..., Result], *arguments: object) -> Result:
    """`work(*arguments)` in a new process; work, arguments and result must be such that pickle takes them."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        outcome = ours.recv()
    except EOFError:
        process.join()
        outcome = RelayError(_why_it_ended(process.exitcode or 0))
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
        ours.close()
    if isinstance(outcome, RelayError):
        raise outcome
    return outcome


def _work(connection: Connection, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    signals.listen()
    try:
        outcome = work(*arguments)
    except RelayError as error:
        outcome = error
    except (KeyboardInterrupt, signals.Terminated):  # whoever started this process says so
        sys.exit(signals.TERMINATED)
    connection.send(outcome)


def _why_it_ended(status: int) -> str:
    if status < 0:
        return (
            f"a process of this command was killed (signal {-status}); the system does that where memory runs out: "
            "try a smaller memory.budget. What was finished is kept, and the same command goes on from there"
        )
    return f"a process of this command ended with status {status}; what happened stands above"
