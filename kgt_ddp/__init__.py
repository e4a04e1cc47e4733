"""Freeze-aware distributed data parallel training.

    from kgt_ddp import FreezeAwareDDP
    model = FreezeAwareDDP(model)

Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kgt_ddp.activation_cache.dataset import CachedDataset
    from kgt_ddp.activation_cache.loader import CachedLoader
    from kgt_ddp.ddp import FreezeAwareDDP

__all__ = ["CachedDataset", "CachedLoader", "FreezeAwareDDP"]

_HOME = {
    "CachedDataset": "kgt_ddp.activation_cache.dataset",
    "CachedLoader": "kgt_ddp.activation_cache.loader",
    "FreezeAwareDDP": "kgt_ddp.ddp",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'kgt_ddp' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
