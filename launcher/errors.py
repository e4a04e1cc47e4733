"""The launcher's errors, on one page.

A mistake of the user is a `ValueError` raised while the configuration is built (`launcher.config`). What happens to a
launch that started is an `Outcome`, not an exception. These are what remains.
"""

from __future__ import annotations

import signal


class LauncherError(Exception):
    """Base of all of them; the message is for the user."""


class LostRendezvousError(LauncherError):
    """The other nodes cannot be reached any more, or never could."""


def exit_status(returncode: int) -> int:
    """What a shell would report: the code itself, or 128+N for a process that signal N ended."""
    return 128 - returncode if returncode < 0 else returncode


def describe_exit(returncode: int) -> str:
    """Say it in words: `exit code 3`, `SIGKILL (signal 9)`."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"{signal.Signals(-returncode).name} (signal {-returncode})"
    except ValueError:
        return f"signal {-returncode}"
