"""Which rank failed first, and what it said.

Order: the moment a rank raised (stamped by its boot step, where the exception was not caught) or, without that, the
moment its process ended. The process that raised first is the cause even if its interpreter takes longer to shut down
than that of a peer that lost its connection to it.

A process that ends without raising (a signal, os._exit) closes its sockets a little before its end can be seen, and a
peer may raise in between: it goes before exceptions raised up to `_ABRUPT_S` earlier. SIGABRT does not, because gloo
and NCCL abort as a consequence. Ranks that ended after we began to end them are consequences.

A rank that raised first but is slow to leave (its `finally` blocks close its connections and then do something else) is
recorded only when the exception leaves the script. So what looks like a reaction to that (`is_reaction`) goes after what
does not and came up to `HEAR_OUT_S` later; `launcher.attempt` gives the others this long to tell.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.endings import Ending
from launcher.outcome import Failure

_NUM_LAST_LINES = 20
_LAST_BYTES = 16384
_ABRUPT_S = 0.5
HEAR_OUT_S = 3.0
_LOST_CONNECTION = re.compile(
    r"^[\w.]*(Connection\w*Error|BrokenPipeError|DistNetworkError)\b"
    r"|connection (was likely )?closed|connection reset|connection refused|broken pipe|socket (unexpectedly )?closed"
    r"|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
"""Words of Python, gloo, NCCL and torch's store."""


def read_error(path: Path) -> dict[str, Any]:
    """What the boot step wrote about an uncaught exception: `monotonic_s`, `code`, `origin`, `traceback`; or nothing.

    `origin` is the last line of the exception that led to all others.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_reaction(returncode: int, error: dict[str, Any]) -> bool:
    """Whether it looks like the consequence of a peer's end: it lost a connection, or aborted without a word."""
    if error:
        return _LOST_CONNECTION.search(str(error.get("origin", ""))) is not None
    return returncode == -signal.SIGABRT


def read_torch_error(path: Path) -> str:
    """The traceback in torch's error file, for a command that is not run by the boot step but uses @record."""
    message = read_error(path).get("message", "")
    if isinstance(message, dict):
        return str(message.get("extraInfo", {}).get("py_callstack", message.get("message", "")))
    return str(message)


def last_lines(path: Path | None) -> tuple[str, ...]:
    """The end of a log file, at most 20 lines."""
    if path is None:
        return ()
    try:
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - _LAST_BYTES))
            text = f.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-_NUM_LAST_LINES:])


def gather(
    endings: Iterable[Ending],
    *,
    begun_s: float,
    ended_by_us_s: float | None,
    rank_of: Callable[[int], int],
    error_of: Callable[[int], Path],
    torch_error_of: Callable[[int], Path | None],
    stderr_of: Callable[[int], Path | None],
    excused: Collection[int] = (),
    hint_of: Callable[[Ending], str] = lambda _: "",
) -> tuple[Failure, ...]:
    """Failures of one attempt, the first one first.

    Args:
        endings: ranks by local rank, in the order in which they ended.
        begun_s: monotonic time of the launch.
        ended_by_us_s: monotonic time at which we began to end ranks, None if we did not.
        excused: exit codes that are no failures, besides 0.
    """
    found: list[tuple[float, Failure]] = []
    for ending in endings:
        if ending.returncode in (0, *excused):
            continue
        error = read_error(error_of(ending.key))
        moment_s = min(float(error.get("monotonic_s", ending.monotonic_s)), ending.monotonic_s)
        torch_error = torch_error_of(ending.key)
        stderr = stderr_of(ending.key)
        # It had raised and was on its way out when we ended it: its own code is the one that tells.
        cut_short = ended_by_us_s is not None and ending.monotonic_s > ended_by_us_s and ending.returncode < 0
        returncode = int(error.get("code", ending.returncode)) if cut_short else ending.returncode
        consequence = ended_by_us_s is not None and moment_s > ended_by_us_s
        failure = Failure(
            rank=rank_of(ending.key),
            local_rank=ending.key,
            host=socket.gethostname(),
            pid=ending.pid,
            returncode=returncode,
            after_s=round(moment_s - begun_s, 3),
            traceback=str(error.get("traceback", "")) or (read_torch_error(torch_error) if torch_error else ""),
            log_path=str(stderr or ""),
            last_lines=last_lines(stderr),
            hint="" if consequence else hint_of(ending),
            consequence=consequence,
            reaction=is_reaction(ending.returncode, error),
        )
        abrupt = not error and not consequence and not failure.reaction
        found.append((moment_s + delay_s(failure) - (_ABRUPT_S if abrupt else 0), failure))
    found.sort(key=lambda item: (item[1].consequence, item[0]))
    return tuple(replace(f, consequence=f.consequence or i > 0) for i, (_, f) in enumerate(found))


def delay_s(failure: Failure) -> float:
    """How much later than it happened it counts, against others."""
    return HEAR_OUT_S if failure.reaction else 0.0
