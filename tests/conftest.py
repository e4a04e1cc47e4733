"""Shared fixtures."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _without_kgtrun_environment(monkeypatch):
    """A test sees no variable of a kgtrun that runs it."""
    for name in [n for n in os.environ if n.startswith("KGTRUN_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def run_ranks():
    """See `tests.ranks.run_ranks`."""
    from tests.ranks import run_ranks

    return run_ranks
