"""The freeze mask: which blocks are frozen, and since which decision. Pure; no torch.

Only prefixes are valid: a frozen block behind an active one would save its weight gradients but not its backward, and its
input gradients would still have to flow through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mask:
    """The first `frontier` of `num_blocks` blocks are frozen. `generation` counts the masks applied before. `at_mean` says how
    this mask freezes what it adds, not what is frozen: equal masks may differ in it."""

    frontier: int
    num_blocks: int
    generation: int = 0
    at_mean: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.frontier < max(self.num_blocks, 1):
            raise ValueError(
                f"frontier {self.frontier} is out of range: 0 to {max(self.num_blocks - 1, 0)} "
                f"of {self.num_blocks} blocks can be frozen (the last one always trains)"
            )

    def frozen(self, block: int) -> bool:
        return block < self.frontier

    def encode(self) -> list[int]:
        """One 0/1 number a block, front to back."""
        return [int(self.frozen(block)) for block in range(self.num_blocks)]

    @classmethod
    def decode(cls, flags: list[int], generation: int, *, at_mean: bool = False) -> Mask:
        """Inverse of `encode`.

        Raises:
            ValueError: the frozen blocks are not a prefix.
        """
        frontier = sum(1 for flag in flags if flag)
        if any(flags[frontier:]):
            raise ValueError(f"the frozen blocks {flags} are not a prefix")
        return cls(frontier=frontier, num_blocks=len(flags), generation=generation, at_mean=at_mean)

    def moved_to(self, frontier: int, *, at_mean: bool = False) -> Mask:
        """The next mask: another frontier, one generation on."""
        return Mask(frontier=frontier, num_blocks=self.num_blocks, generation=self.generation + 1, at_mean=at_mean)
