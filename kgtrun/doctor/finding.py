"""One thing the doctor has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A fact, or a problem when it has a cure."""

    topic: str
    words: str
    cure: str = ""
    serious: bool = True
    """Whether a problem stands in the way of every run; False: of runs over several nodes only."""
