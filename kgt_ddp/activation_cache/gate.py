"""Does caching pay at this frontier? Pure: seconds and counts in, a decision out; the clock is the caller's.

States, of one frontier: *trying* -> *open* or *closed*; open -> closed; closed -> trying, again and again, ever more rarely.

- Trying: no hits yet, as in every first epoch. It goes on while what it costs stays a small share of the training time and
  until `patience` samples were looked up in vain.
- Open: a window of batches had hits, and they saved more than looking up, reading and writing cost. Two windows in a row
  that lost close it.
- Closed: nothing is hashed, read or written. After `PAUSE` batches, doubling each time, a short try of `RETRY` batches asks
  again: its cost is bounded by their ratio. A try finds only what was written before, so after a long first epoch it says
  little: `begin_again` is for when it is known from elsewhere that samples come again.

Before any of this, `predict` compares one read with one computation: where reading a record is likely to take longer than
computing it (a shallow prefix with wide outputs), the frontier stays closed without a try.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 24
"""Batches between decisions."""
RETRY = 8
PAUSE = 512
LONGEST_PAUSE = 16_384
PATIENCE = 50_000
"""Samples looked up without hits before a try ends, if nobody knows the length of an epoch."""
LOW_HIT_RATE = 0.02
TRIAL_SHARE = 0.02
"""Share of the training time that a try may cost; more where more could be won, see `_allowance`."""
HOPE = 0.1
"""Part of what hits would save that a try may cost in any case; half of it where the data is known to repeat."""
MARGIN = 0.9
"""A read is worth it if it takes less than this part of the computation."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """One batch."""

    samples: int
    hits: int = 0
    undecoded: int = 0
    """Hits that need not be decoded (`dataset.CachedDataset`)."""
    wall_s: float = 0.0
    """Time since the batch before."""
    lookup_s: float = 0.0
    """Hashing, and looking for records."""
    read_s: float = 0.0
    """Putting the records that were found together."""
    write_s: float = 0.0
    """On the training thread."""


class Gate:
    """See the module docstring.

    Args:
        patience: samples of an epoch and a half, where known.
        repeating: share of the samples of which it is known that they come again and again.
    """

    def __init__(self, patience: int = PATIENCE, *, repeating: float = 0.0) -> None:
        self.state: str
        self.reason: str
        """Of the last change of state, for people."""
        self._dear = False
        self._compute_s = 0.0
        self._computed = 0
        self._decode_s = 0.0
        self._looked_up = 0
        self._window: list[Spent] = []
        self._losses = 0
        self.begin_again(patience, repeating=repeating, reason="")

    def begin_again(self, patience: int, *, repeating: float, reason: str) -> None:
        """Try as if nothing had been tried yet; what computing takes is still known. Arguments as above."""
        self.state, self.reason = "trying", reason
        self._patience = patience
        self._hope = max(HOPE, repeating / 2)
        self._pause, self._batches_closed, self._retrying = PAUSE, 0, False

    @property
    def in_vain(self) -> bool:
        """Whether it is closed, and for lack of hits alone: not for what they would cost."""
        return self.state == "closed" and not self._dear

    @property
    def compute_s_per_sample(self) -> float:
        """Seconds that the prefix takes for a sample; 0 while unknown."""
        return self._compute_s / self._computed if self._computed else 0.0

    def computed(self, samples: int, seconds: float) -> None:
        """The prefix was computed for so many samples. Older measurements fade."""
        if self._computed > 32 * samples:
            self._computed, self._compute_s = self._computed // 2, self._compute_s / 2
        self._computed += samples
        self._compute_s += seconds

    def decodes(self, seconds_per_sample: float) -> None:
        """What the training gains by each sample that is not decoded, besides computing; 0 where all samples are."""
        self._decode_s = seconds_per_sample

    def predict(self, read_s_per_sample: float) -> None:
        """Compare a read with a computation before anything is written."""
        saved_s = self.compute_s_per_sample + self._decode_s
        if self._computed and read_s_per_sample > MARGIN * saved_s:
            self._close(
                f"reading a sample would take {read_s_per_sample * 1e6:.0f} us, "
                f"{'decoding and ' if self._decode_s else ''}computing it takes {saved_s * 1e6:.0f} us",
                dear=True,
            )

    def give_up(self, reason: str) -> None:
        """Start closed: what is known of the data leaves no hope of hits. It is tried again as after any other end."""
        self._close(reason)

    def admits(self) -> bool:
        """Whether the next batch is to use the cache. Call once a batch."""
        if self.state != "closed":
            return True
        self._batches_closed += 1
        if self._batches_closed < self._pause:
            return False
        self.state, self._retrying, self._batches_closed = "trying", True, 0
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return True

    def spent(self, batch: Spent) -> bool:
        """Note a batch that used the cache; returns whether the state changed."""
        before = self.state
        self._looked_up += batch.samples
        self._window.append(batch)
        if len(self._window) >= (RETRY if self._retrying else WINDOW):
            window, self._window = self._window, []
            self._decide(window)
        return self.state != before

    def _decide(self, window: list[Spent]) -> None:
        samples = sum(b.samples for b in window)
        hits = sum(b.hits for b in window)
        cost = sum(b.lookup_s + b.read_s + b.write_s for b in window)
        wall = sum(b.wall_s for b in window)
        saved = hits * self.compute_s_per_sample + sum(b.undecoded for b in window) * self._decode_s
        rate = hits / samples if samples else 0.0
        retrying, self._retrying = self._retrying, False
        if rate >= LOW_HIT_RATE:
            self._looked_up = 0
        if rate >= LOW_HIT_RATE and saved > cost:
            self.state, self._losses, self._pause, self._dear = "open", 0, PAUSE, False
            self.reason = f"{rate:.0%} hits save {saved / len(window):.2g} s a batch, for {cost / len(window):.2g} s"
            return
        if retrying:
            self._close(f"{rate:.1%} hits in a short try", dear=rate >= LOW_HIT_RATE)
        elif rate < LOW_HIT_RATE and self._looked_up >= self._patience:
            self._close(f"{rate:.1%} hits after {self._looked_up:,} samples")
        elif cost > self._allowance(wall, samples) + saved:
            self._losses += 1
            if self._losses >= 2:
                self._close(f"{rate:.1%} hits; the cache costs {cost / max(wall, 1e-9):.1%} of the time", dear=True)
        else:
            self._losses = 0

    def _allowance(self, wall: float, samples: int) -> float:
        """Seconds that a window may cost while hits are still to come: a part of what they would save, at least."""
        return max(TRIAL_SHARE * wall, self._hope * samples * (self.compute_s_per_sample + self._decode_s))

    def _close(self, reason: str, *, dear: bool = False) -> None:
        self.state, self.reason = "closed", reason
        self._dear = self._dear or dear  # until hits open it: a short try without hits says nothing of costs
        self._losses = self._looked_up = 0
        self._window = []
