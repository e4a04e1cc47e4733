"""Shows progress while ranks run: a live line on a terminal (with rich), a plain line a minute otherwise.

Output of ranks appears above the live line; what goes to a file or a pipe stays out of it. Without heartbeats (a script
without a DDP of ours), and once the ranks have ended, nothing is shown.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

PLAIN_LINE_S = 60.0
_LOOK_S = 1.0
_REFRESH_PER_S = 2

Words = Callable[[], str | None]
"""What to show now, None for nothing. A rate comes from one call to the next: it is called once a second or more often."""


@contextlib.contextmanager
def progress_line(words: Words, *, stream: TextIO | None = None) -> Iterator[None]:
    """Show `words` as long as the block runs."""
    out = sys.stderr if stream is None else stream
    shown = _live(words) if out.isatty() and os.environ.get("TERM") != "dumb" else None
    with shown or _plain(words, out):
        yield


def _live(words: Words) -> contextlib.AbstractContextManager | None:
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        return None

    def line() -> Text:
        return Text(words() or "", style="dim", no_wrap=True, overflow="ellipsis")

    # soft_wrap: a long line of a rank is the terminal's to break, not ours.
    return Live(
        console=Console(stderr=True, soft_wrap=True),
        get_renderable=line,
        refresh_per_second=_REFRESH_PER_S,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )


@contextlib.contextmanager
def _plain(words: Words, out: TextIO, *, every_s: float = PLAIN_LINE_S) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        due_s = time.monotonic() + every_s
        while not over.wait(min(every_s, _LOOK_S)):
            text = words()  # between the lines, too: the first one would know no rate
            if time.monotonic() < due_s:
                continue
            due_s = time.monotonic() + every_s
            if text:
                print(f"kgtrun: {text}", file=out, flush=True)

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)
