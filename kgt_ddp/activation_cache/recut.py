"""The frontier has moved on: are the records of the cut before it worth keeping, or is it worth making new ones?

A record behind block 5 is as good as ever when block 6 is frozen, too: the blocks in between are computed from it. New
records save more a sample, but only from the epoch after the next on, because they have to be written first. With E for
the epochs that are left, f for the share of the old records that is there already, and a gain that grows with the number of
blocks that are skipped:

    keep:   old cut x (E - (1 - f))        make new ones:   new cut x (E - 1)

Blocks are counted, not timed, and nothing else that ranks could see differently goes in: each decides alone, and those of a
node share their records only if they cut at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the job is, as one rank knows it."""

    epoch: int | None
    """Samples of this rank in an epoch; None while none came again."""
    num_samples: int
    """Samples of this rank up to now."""
    step: int
    total_steps: int | None

    @property
    def epochs_to_come(self) -> float | None:
        """Of a job of unknown length as many as there were; None while nobody knows what an epoch is."""
        if not self.epoch:
            return None
        epochs = self.num_samples / self.epoch
        if self.total_steps is None or not self.step:
            return epochs
        return epochs * max(self.total_steps - self.step, 0) / self.step


def worth_recutting(old_cut: int, new_cut: int, progress: Progress, *, num_filled: int, finds: bool) -> bool:
    """Whether to leave the records behind block `old_cut` - 1 for new ones, deeper in the model.

    Args:
        num_filled: samples of this rank that were looked up among the old records, and written where they were missing.
        finds: whether the latest batch was among the old records.
    """
    epochs = progress.epochs_to_come
    if epochs is None:
        return True
    assert progress.epoch
    filled = 1.0 if finds else min(num_filled / progress.epoch, 1.0)
    return new_cut * max(epochs - 1, 0.0) > old_cut * max(epochs - (1 - filled), 0.0)
