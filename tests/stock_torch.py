"""Runs of torch without kgtrun, for comparison, on machines that other work keeps busy."""

from __future__ import annotations

from collections.abc import Callable

ABORT = "terminate called without an active exception"
_ATTEMPTS = 3


def run_to_an_orderly_end(run: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Exit code and output of a run, which is repeated where torch's own end went wrong.

    A rank of stock torch may die of a gloo thread after all its work is done (kgt_ddp/gloo_exit.py says why, and what
    kgtrun does about it); that is no finding about the script. Whatever else fails is not repeated.
    """
    for _ in range(_ATTEMPTS):
        code, text = run()
        if code == 0 or ABORT not in text:
            break
    return code, text
