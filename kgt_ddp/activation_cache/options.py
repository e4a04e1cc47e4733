"""How to cache: what the launcher's environment says, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kgt_ddp.activation_cache.gate import PATIENCE
from kgtrun.contract import environment

MODES = ("off", "auto", "on")
DEFAULT_MODE = "off"


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How to cache.

    Raises:
        ValueError: `mode` or `budget_bytes` is none of what is valid.
    """

    mode: str = DEFAULT_MODE
    """"off"; "auto": where a measurement says that it pays; "on": wherever it can be done."""
    directory: Path | None = None
    """Of the files; a folder of this user under the system's temporary directory when left out."""
    budget_bytes: int | None = None
    """Of all files in the directory; a quarter of the free space when left out."""
    exact: bool = False
    """Keep 32-bit floats as they are, not as bfloat16."""
    patience: int = PATIENCE
    """Samples to look up without a hit before giving up: an epoch and a half of one rank."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"{environment.CACHE}={self.mode!r}: use one of {', '.join(MODES)}")
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise ValueError(f"{environment.CACHE_BYTES}={self.budget_bytes}: a cache needs at least some bytes")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> CacheOptions:
        """What the launcher set."""
        environ = os.environ if environ is None else environ
        directory = environ.get(environment.CACHE_DIR)
        return cls(
            mode=environ.get(environment.CACHE) or DEFAULT_MODE,
            directory=Path(directory) if directory else None,
            budget_bytes=environment.integer(environment.CACHE_BYTES, environ=environ),
            exact=_exact(environ.get(environment.CACHE_DTYPE, "")),
        )


def _exact(text: str) -> bool:
    if text not in ("", "bf16", "exact"):
        raise ValueError(f"{environment.CACHE_DTYPE}={text!r}: use bf16 or exact")
    return text == "exact"
