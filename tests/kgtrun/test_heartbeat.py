from __future__ import annotations

import os
import time

import pytest

from kgtrun.contract import environment, heartbeat


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "_map", None)
    monkeypatch.setattr(heartbeat, "_pid", None)
    monkeypatch.setenv(environment.HEARTBEAT, str(tmp_path / "beat"))
    return tmp_path / "beat"


def test_a_beat_is_read_from_outside(path):
    assert heartbeat.read(path) is None
    heartbeat.beat(7, frontier=3, saved_s=1.5)
    found = heartbeat.read(path)
    assert (found.step, found.frontier, found.saved_s) == (7, 3, 1.5)
    assert abs(found.monotonic_s - time.monotonic()) < 5


def test_a_forked_child_does_not_beat_for_its_parent(path):
    heartbeat.beat(1)
    pid = os.fork()
    if pid == 0:
        heartbeat.beat(99)
        os._exit(0)
    os.waitpid(pid, 0)
    assert heartbeat.read(path).step == 1


def test_without_the_variable_or_with_an_impossible_path_nothing_happens(path, monkeypatch):
    monkeypatch.setenv(environment.HEARTBEAT, "/nowhere/at/all")
    heartbeat.beat(1)
    monkeypatch.delenv(environment.HEARTBEAT)
    monkeypatch.setattr(heartbeat, "_pid", None)
    heartbeat.beat(1)


def test_it_costs_microseconds(path):
    heartbeat.beat(0)
    best = min(_time_1000() for _ in range(5))
    assert best < 0.02  # 20 µs a beat, ten times what it takes on a busy machine
    assert heartbeat.read(path).step == 999


def _time_1000() -> float:
    begun = time.perf_counter()
    for step in range(1000):
        heartbeat.beat(step)
    return time.perf_counter() - begun
