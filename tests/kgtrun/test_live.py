from __future__ import annotations

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
    text = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:
            break
        if not chunk:
            break
        text += chunk
    os.close(leader)
    assert process.wait(10) == 0
    assert b"step 41" in text and b"a line of a rank\r\n" in text
