"""The file of a trace: what a policy was fed or would have been, decision by decision.

One JSON object. `blocks`, `total_steps`, `interval` and `lag_steps` are the job's; `records` has one entry a decision: step,
learning rate, mean loss since the last one, L1 norm of each block's gradient summed over the steps since the last one,
plasticity for the distances `lag_steps`, twice and four times that, and its floor. `to_end` is the distance to the weights
that the job ended with, which no policy can know. `accuracy` and `held_out_loss` are those of held-out samples at the
end. A trace made of a run (`benchmarks.trace_of_run`) has no loss, no norms and no ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIGNALS = {"plasticity": 1, "plasticity_2": 2, "plasticity_4": 4}
"""Signal to multiple of the lag."""


def write(trace: Mapping[str, Any], path: Path) -> None:
    """One line a record, so that two traces can be compared by eye."""
    head = json.dumps({k: v for k, v in trace.items() if k != "records"})
    lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in trace["records"])
    path.write_text(f'{head[:-1]}, "records": [\n{lines}\n]}}\n')


def rounded(value: float | None) -> float | None:
    """Three significant digits: a score scatters by more."""
    return None if value is None else float(f"{value:.3g}")
