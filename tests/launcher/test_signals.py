from __future__ import annotations

import os
import signal
import time

import pytest

from launcher.signals import SignalDesk, Stopped


@pytest.fixture
def desk():
    """A desk for USR2 as the stop signal, whose main thread is given 0 s and the slack."""
    last: list[signal.Signals] = []
    made = SignalDesk(stop=[signal.SIGUSR2], forward=(), targets=list, last_resort=last.append, grace_s=0)
    yield made, last
    made.close()


def send() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.01)


def test_the_first_stop_signal_interrupts_and_the_second_hurries(desk):
    one, _ = desk
    with pytest.raises(Stopped) as stopped:
        send()
    assert stopped.value.sigval == signal.SIGUSR2 and not one.hurry()
    send()
    assert one.hurry()


def test_while_the_launch_concludes_a_stop_signal_interrupts_nothing_and_nobody_is_taken_for_stuck(desk, monkeypatch):
    one, last = desk
    monkeypatch.setattr("launcher.signals._SLACK_S", 0.05)
    one.concluding(0.5)
    send()
    assert one.received == [signal.SIGUSR2]
    time.sleep(0.2)
    assert last == []
    time.sleep(0.6)
    assert last == [signal.SIGUSR2], "what takes longer than it may is stuck after all"


def test_a_second_stop_signal_hurries_the_conclusion_too(desk, monkeypatch):
    one, last = desk
    monkeypatch.setattr("launcher.signals._HURRY_S", 0.05)
    one.concluding(30)
    send()
    send()
    time.sleep(0.4)
    assert one.hurry() and last == [signal.SIGUSR2]
