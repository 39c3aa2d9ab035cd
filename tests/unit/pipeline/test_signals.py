"""A signal waits for the step under way; a second one does not."""

import os
import signal

import pytest

from flux2_relay.pipeline import signals

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def step(*numbers: signal.Signals, heard: list[bool]) -> None:
    """A step during which these signals come; what it hears after each."""
    with signals.finish_the_step() as stop:
        heard.append(stop())
        for number in numbers:
            os.kill(os.getpid(), number)
            heard.append(stop())


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_noted_and_its_exit_follows(number: signal.Signals) -> None:
    before, heard = [signal.getsignal(one) for one in NUMBERS], []
    with pytest.raises(signals.Terminated) as leaving:
        step(number, heard=heard)
    assert heard == [False, True]
    assert leaving.value.exit_status == 128 + number
    assert [signal.getsignal(one) for one in NUMBERS] == before


@pytest.mark.parametrize("second", NUMBERS)
def test_a_second_signal_does_not_wait(second: signal.Signals) -> None:
    heard: list[bool] = []
    with pytest.raises(signals.Terminated) as leaving:
        step(signal.SIGINT, second, heard=heard)
    assert heard == [False, True]
    assert leaving.value.exit_status == 128 + second


def test_without_a_signal_nothing_follows() -> None:
    heard: list[bool] = []
    step(heard=heard)
    assert heard == [False]
