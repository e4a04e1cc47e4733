"""Every error this package raises for its users, on one page.

`KgtError` is the root. Wrong arguments are `ValueError`s as well, so that code written against torch's conventions
catches them.
"""

from __future__ import annotations


class KgtError(Exception):
    """Root of the errors raised by kgt_ddp."""


class BlockError(KgtError, ValueError):
    """A model cannot be cut into the blocks that were asked for."""


class PolicyError(KgtError, ValueError):
    """A policy specification is unknown, incomplete or out of range."""


class FreezingUnsupportedError(KgtError, ValueError):
    """This DistributedDataParallel configuration cannot be frozen."""


class AgreementError(KgtError, RuntimeError):
    """The ranks could not agree: a rank is gone, stalled, or was built differently."""


class MaskMismatchError(AgreementError):
    """Ranks hold different masks. Raised on every rank before the first backward that would be affected."""
