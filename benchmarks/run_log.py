"""Finished runs of a benchmark that can be stopped and goes on: one JSON object a line, added as each run ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add(path: Path, run: Mapping[str, Any]) -> None:
    """Add a finished run; the file and its folder are made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" + json.dumps(run))  # the newline first: a torn line ends here


def read(path: Path) -> list[dict[str, Any]]:
    """All runs in the file, in order; none where there is no file. A torn line is skipped."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
