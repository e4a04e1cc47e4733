"""What the cache did, counted: for the events, the summary and the benchmarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Counters:
    """Totals of one process. Seconds are of the thread that did it."""

    batches: int = 0
    """Training forwards with a frozen prefix while the cache was on."""
    full_batches: int = 0
    """Of these, those whose prefix did not run at all."""
    partial_batches: int = 0
    """Those that computed the missing samples only."""
    hits: int = 0
    """Samples read."""
    misses: int = 0
    """Samples looked for in vain."""
    prefetched: int = 0
    """Hits that were read ahead of time."""
    bytes_read: int = 0
    bytes_written: int = 0
    key_s: float = 0.0
    """Hashing."""
    read_s: float = 0.0
    """Looking records up and putting batches together; hashing included."""
    write_s: float = 0.0
    """On the training thread: copying what is to be written."""
    background_s: float = 0.0
    """Of the writing and reading threads."""
    check_s: float = 0.0
    """First uses and spot checks."""
    forward_saved_s: float = 0.0
    """An estimate: samples that were not computed, times what computing one takes here."""
    records_dropped: int = 0
    """Not written because the writer was behind."""
    corrupt: int = 0
    """Records that did not pass their check."""
    spot_checks: int = 0
    """Batches computed although they were there, and compared."""

    def as_dict(self) -> dict[str, Any]:
        looked_up = self.hits + self.misses
        return {
            **{k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()},
            "hit_rate": round(self.hits / looked_up, 4) if looked_up else None,
        }
