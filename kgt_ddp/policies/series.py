"""Short statistics of short series, in plain Python: what the policies share. A value that is None is unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence


def known(value: float | None) -> bool:
    """Is it a number that may be reckoned with?"""
    return value is not None and math.isfinite(value)


def slope(values: Sequence[float]) -> float:
    """Least-squares slope of at least two values at 0, 1, 2, …"""
    middle = (len(values) - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * value for i, value in enumerate(values)) / spread


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of every `window` neighbours; empty for fewer values than that."""
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
