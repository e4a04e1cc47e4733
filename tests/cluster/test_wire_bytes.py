"""The bytes that the hook counts are the bytes that leave the host."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import hosts, needs_hosts

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "tests" / "cluster" / "wire_bytes_job.py")


@pytest.mark.cluster
@needs_hosts
def test_the_hooks_count_equals_the_interface_counters_within_five_percent(tmp_path):
    with hosts(2, tmp_path / "net") as cluster:
        ranks = [
            cluster.start(
                f"h{node}",
                sys.executable, "-m", "kgtrun",
                "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
                "--master-addr", "h0", "--master-port", "29400",
                "--policy", "static:blocks=3,step=18", "--run-dir", str(tmp_path / "run"),
                JOB,
                PYTHONPATH=str(ROOT),
            )
            for node in range(2)
        ]  # fmt: skip
        outputs = [rank.communicate(timeout=150)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    (line,) = [line for line in outputs[0].splitlines() if "MARKS " in line]
    marks = json.loads(line.split("MARKS ", 1)[1])
    (before, before_wire, _), (after, after_wire, unfrozen) = marks[:2]
    assert unfrozen == 0
    whole, whole_wire = after - before, after_wire - before_wire
    (before, before_wire, _), (after, after_wire, frozen) = marks[2:]
    assert frozen == 3
    part, part_wire = after - before, after_wire - before_wire
    # Two ranks: each sends every reduced byte once.
    assert whole_wire / whole == pytest.approx(1.0, abs=0.05)
    assert part_wire / part == pytest.approx(1.0, abs=0.05)
    assert part / whole == pytest.approx(0.5, abs=0.01)
    print(f"\nwire over hook: {whole_wire / whole:.4f} unfrozen, {part_wire / part:.4f} with half of the blocks frozen")
