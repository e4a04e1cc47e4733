from __future__ import annotations

import io
import signal
import struct
import subprocess
import time

import pytest

from kgtrun import live
from launcher.attempt import Attempt
from launcher.config import LaunchConfig, LogSpec, RankSpec, RendezvousSpec, SidecarSpec
from launcher.progress import Progress, ProgressMeter
from launcher.runtime_dir import RuntimeDir


def beat(path, step: int, second: float, frontier: int = 0, saved_s: float = 0.0) -> None:
    path.write_bytes(struct.pack("<QQqd", step, int(second * 1e9), frontier, saved_s))


def test_the_slowest_rank_counts(tmp_path):
    meter, paths = ProgressMeter(), [tmp_path / "a", tmp_path / "b"]
    assert meter.look([]) is None and meter.look(paths) is None
    beat(paths[0], 10, 1.0)
    assert meter.look(paths) is None
    beat(paths[1], 8, 1.0, frontier=2)
    assert meter.look(paths, now_s=1.5) == Progress(8, None, 2, 0.0, silent_s=0.5)
    beat(paths[1], 18, 2.0, frontier=2, saved_s=3.4)
    beat(paths[0], 30, 2.0)
    assert meter.look(paths, now_s=2.0) == Progress(18, 10.0, 2, 3.4)
    assert meter.look(paths, now_s=9.0) == Progress(18, 10.0, 2, 3.4, silent_s=7.0)


def test_the_rate_is_that_of_the_last_half_minute_however_often_one_looks(tmp_path):
    meter, path = ProgressMeter(), tmp_path / "a"
    step = 0
    for second in range(1, 101):
        step += 40 if second <= 60 else 10  # it becomes slower
        beat(path, step, second)
        found = [meter.look([path], now_s=second) for _ in range(second % 3 + 1)]
    assert found[-1].steps_per_s == 10.0
    beat(path, 3, 101)  # a restart
    assert meter.look([path], now_s=101).steps_per_s is None


def test_a_rate_is_known_where_steps_take_longer_than_the_window(tmp_path):
    meter, path = ProgressMeter(), tmp_path / "a"
    for step in range(4):
        beat(path, step, 1 + 50.0 * step)
        found = meter.look([path], now_s=1 + 50.0 * step)
    assert found.steps_per_s == pytest.approx(0.02) and found.words() == "step 3 · 50 s a step"


def test_words():
    assert Progress(1200, 35.21, 3, 12.4).words() == "step 1200 · 35.2 steps/s · 3 blocks frozen · 12 s saved"
    assert Progress(5, 1.0, 1, 0.0).words() == "step 5 · 1 steps/s · 1 block frozen"


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (None, "step 5"),
        (1234.5, "step 5 · 1234 steps/s"),
        (0.4, "step 5 · 2.5 s a step"),
        (0.0004, "step 5 · 2500 s a step"),
    ],
)
def test_a_rate_is_never_rounded_to_nothing(rate, words):
    assert Progress(5, rate, 0, 0.0).words() == words


@pytest.mark.parametrize(
    ("rate", "silent_s", "silent"),
    [(35.0, 9, False), (35.0, 10, True), (0.1, 29, False), (0.1, 31, True), (0.001, 60, True), (None, 60, True)],
)
def test_without_a_step_for_long_the_silence_is_told_instead(rate, silent_s, silent):
    words = Progress(22, rate, 0, 0.0, silent_s).words()
    assert (words == f"step 22 · no step for {silent_s} s") == silent
    assert ("step/s" in words or "steps/s" in words or "a step" in words) == (not silent)


def test_two_plain_lines_without_a_step_between_them_never_show_a_rate(tmp_path):
    meter, path = ProgressMeter(), tmp_path / "a"
    for second in (1.0, 101.0):
        beat(path, int(second), second)
        meter.look([path], now_s=second)
    assert "no step for" in meter.look([path], now_s=101.0 + live.PLAIN_LINE_S).words()


def test_the_plain_line_knows_a_rate_the_first_time(monkeypatch, tmp_path):
    monkeypatch.setattr(live, "_LOOK_S", 0.01)
    meter, path, out, begun = ProgressMeter(), tmp_path / "a", io.StringIO(), time.monotonic()

    def words() -> str:
        now = time.monotonic()
        beat(path, int((now - begun) * 1000), now)
        return meter.look([path]).words()

    with live._plain(words, out, every_s=0.2):
        time.sleep(0.5)
    lines = out.getvalue().splitlines()
    assert 1 <= len(lines) <= 2 and all("steps/s" in line for line in lines)


@pytest.mark.integration
def test_ranks_that_have_ended_are_not_looked_at(tmp_path):
    config = LaunchConfig(
        ranks=RankSpec(command=("true",), count="2"),
        rendezvous=RendezvousSpec(run_id="x"),
        logs=LogSpec(directory=tmp_path),
        sidecars=SidecarSpec(command=(), count=0),
        run_dir=tmp_path,
        hang_timeout_s=0,
    )
    ranks = [subprocess.Popen(["sleep", "0"]), subprocess.Popen(["sleep", "60"])]
    pids = {local_rank: process.pid for local_rank, process in enumerate(ranks)}
    told: dict = {"runtime": RuntimeDir(tmp_path), "begun_s": 0.0, "event": lambda kind, **fields: None}
    attempt = Attempt(0, pids, {0: 0, 1: 1}, config=config, **told)
    for process, left in ((ranks[0], [1]), (ranks[1], [])):
        deadline = time.monotonic() + 30
        while attempt.running_ranks() != left and time.monotonic() < deadline:
            time.sleep(0.02)
        assert attempt.running_ranks() == left
        ranks[1].kill()
        process.wait(5)
    nowhere = {"find": set, "hurry": lambda: True, "between": lambda: None}
    attempt.stop(signal.SIGTERM, stderr_of=lambda _: None, torch_error_of=lambda _: None, **nowhere)
