"""The benchmarks are not installed: they are imported from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    # In front: `tests` itself is on the path and has a folder of the same name.
    sys.path.insert(0, ROOT)
