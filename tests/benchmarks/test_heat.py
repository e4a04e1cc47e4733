from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import heat, run_log
from benchmarks.accuracy_jobs import run_name, settings
from benchmarks.machine import arithmetic
from benchmarks.turns import JobFailed, Turn

FULL = settings("vision", quick=False, changed={})


class FakeJob:
    """Three turns; the policy named in the log's name as broken fails in the second."""

    order: list[str] = []
    places: tuple[str, ...] = ("start", "0", "exit")

    def __init__(self, command: Any, *, log: Path, **_: Any) -> None:
        self.name, self.log, self.turns, self.ended = log.stem, log, [], False

    def turn(self) -> Turn:
        if "static" in self.name and len(self.turns) == 1:
            raise JobFailed(f"{self.name} ended with exit code 1")
        self.order.append(self.name)
        self.turns.append(Turn(place=self.places[len(self.turns)], wall_s=1.0, cpu_s=2.0, reference_cpu_s=0.0))
        self.ended = len(self.turns) == len(self.places)
        if self.ended:
            self.log.with_suffix(".json").write_text("{}")
        return self.turns[-1]

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeJob:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_run_that_fails_leaves_the_others_going(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "Job", FakeJob)
    monkeypatch.setattr(FakeJob, "order", [])
    policies = ["none", "static:blocks=1,step=2", "kgt"]
    failures = heat.run_heat("vision", policies, 0, FULL, tmp_path)
    assert failures == ["vision-static_blocks_1_step_2-seed0 ended with exit code 1"]
    found = run_log.read(tmp_path / "runs.jsonl")
    assert [record["policy"] for record in found] == ["none", "kgt"]
    plain, broken, kgt = (run_name("vision", policy, 0) for policy in policies)
    assert FakeJob.order == [plain, broken, kgt, kgt, plain, plain, kgt]


def test_where_plain_is_from_another_heat_a_plain_job_takes_two_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heat, "Job", FakeJob)
    monkeypatch.setattr(FakeJob, "order", [])
    monkeypatch.setattr(FakeJob, "places", ("start", *map(str, range(10)), "exit"))
    assert heat.run_heat("vision", ["kgt"], 0, FULL, tmp_path) == []
    pace, kgt = (run_name("vision", policy, 0) for policy in ("pace", "kgt"))
    assert [i for i, name in enumerate(FakeJob.order) if name == pace] == [0, 3, 8]
    assert FakeJob.order.count(kgt) == 12
    (record,) = run_log.read(tmp_path / "runs.jsonl")
    assert record["arithmetic"] == arithmetic()
    assert [turn["place"] for turn in record["pace"]] == ["start", "0", "1"]
