from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
import time

import pytest

from kgtrun import live


def test_without_a_terminal_there_is_a_plain_line_now_and_then(monkeypatch):
    out = io.StringIO()
    with live._plain(lambda: "step 3", out, every_s=0.01):
        time.sleep(0.1)
    assert out.getvalue().startswith("kgtrun: step 3\n")
    out = io.StringIO()
    with live._plain(lambda: None, out, every_s=0.01):
        time.sleep(0.05)
    assert out.getvalue() == ""


def read_to_the_end(leader: int) -> bytes:
    """What a terminal was written until nobody has it open any more."""
    text = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 4096):
            text += chunk
    os.close(leader)
    return text


@pytest.mark.integration
def test_on_a_terminal_there_is_a_live_line_below_the_output():
    pytest.importorskip("rich")
    code = (
        "import time, sys; from kgtrun.live import progress_line\n"
        "with progress_line(lambda: 'step 41'):\n    time.sleep(0.7); print('a line of a rank'); time.sleep(0.7)\n"
    )
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm"}
    )
    os.close(follower)
    text = read_to_the_end(leader)
    assert process.wait(10) == 0
    assert b"step 41" in text and b"a line of a rank\r\n" in text


@pytest.mark.integration
def test_what_goes_to_a_file_stays_out_of_the_live_display_and_whole(tmp_path):
    """`kgtrun train.py > train.log` from a terminal: the file gets the ranks' lines, as long as they are."""
    pytest.importorskip("rich")
    code = (
        "import sys, time; from kgtrun.live import progress_line\n"
        "with progress_line(lambda: 'step 41'):\n"
        "    time.sleep(0.7); print('x' * 300); print('e' * 300, file=sys.stderr); time.sleep(0.7)\n"
    )
    leader, follower = pty.openpty()
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=out,
            stderr=follower,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
    os.close(follower)
    shown = read_to_the_end(leader)
    assert process.wait(10) == 0
    assert (tmp_path / "out").read_text() == "x" * 300 + "\n"
    assert b"step 41" in shown and b"e" * 300 in shown and b"xx" not in shown
