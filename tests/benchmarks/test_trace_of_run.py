from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace_of_run import main, trace_of

BLOCKS = {
    **{"kind": "blocks", "policy": "kgt", "total_steps": 100, "interval": 5},
    "blocks": [{"name": "front"}, {"name": "head"}],
}


def score(lag_steps: int, *values: float | None) -> dict[str, Any]:
    return {"kind": "score", "step": 5, "lag_steps": lag_steps, "values": [*values], "floors": [1e-9] * len(values)}


def decision(step: int) -> dict[str, Any]:
    return {"kind": "decision", "step": step, "learning_rate": 0.1}


def test_a_decision_has_the_scores_that_came_since_the_one_before() -> None:
    trace = trace_of(
        [BLOCKS, score(10, 0.5), decision(5), decision(10), score(10, 0.25), score(40, 0.75), decision(15)]
    )
    assert (trace["lag_steps"], trace["blocks"], trace["total_steps"]) == (10, ["front", "head"], 100)
    first, second, third = trace["records"]
    assert (
        first["plasticity"] == [0.5, None] and first["floor"] == [1e-9, None] and first["plasticity_4"] == [None, None]
    )
    assert second["plasticity"] == [None, None]
    assert third["plasticity"] == [0.25, None] and third["plasticity_4"] == [0.75, None]


def test_scores_of_several_ranks_are_averaged_and_a_missing_one_is_left_out() -> None:
    (record,) = trace_of([BLOCKS, score(10, 0.5, None), score(10, 1.5, 0.25), decision(5)])["records"]
    assert record["plasticity"] == [1.0, 0.25]


def test_the_file_is_a_trace(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    lines = [{**event, "time": i} for i, event in enumerate([BLOCKS, score(10, 0.5), decision(5)])]
    (tmp_path / "events" / "trainer0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(tmp_path), "--out", str(tmp_path / "trace.json")]) == 0
    assert json.loads((tmp_path / "trace.json").read_text()) == trace_of(lines)


def test_a_folder_without_decisions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, says in ((tmp_path, "no decision in the events"), (tmp_path / "none", "is no run directory")):
        with pytest.raises(SystemExit):
            main([str(folder), "--out", str(tmp_path / "trace.json")])
        assert says in capsys.readouterr().err


def test_a_run_whose_distances_changed_is_refused_and_one_whose_interval_alone_did_is_not() -> None:
    longer = {"kind": "interval", "step": 7, "was": 5, "interval": 10}
    trace = trace_of([BLOCKS, decision(5), longer, decision(15)])
    assert trace["interval"] == trace["lag_steps"] == 10 and len(trace["records"]) == 2
    with pytest.raises(ValueError, match="the distances changed at step 7"):
        trace_of([BLOCKS, decision(5), {**longer, "interval": 15}, decision(15)])
