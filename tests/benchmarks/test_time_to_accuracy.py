from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run_log, time_to_accuracy
from benchmarks.accuracy_jobs import WORKLOADS, settings
from benchmarks.machine import arithmetic
from benchmarks.time_to_accuracy import finished_runs, is_finished, parse_policies

FULL = {name: settings(name, quick=False, changed={}) for name in WORKLOADS}


def test_policies_are_split_at_commas_that_are_not_their_own() -> None:
    assert parse_policies("none, linear:start=0.3,stop=0.7,kgt") == ["none", "linear:start=0.3,stop=0.7", "kgt"]


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heats = []

    def run_heat(workload: str, policies: Sequence[str], seed: int, chosen: Any, folder: Path) -> list[str]:
        heats.append((workload, seed, *policies))
        for policy in policies:
            record = {"workload": workload, "policy": policy, "seed": seed, "settings": chosen}
            record["arithmetic"] = arithmetic()
            run_log.add(folder / "runs.jsonl", record)
            if len(heats) == 3:
                raise KeyboardInterrupt
        return []

    monkeypatch.setattr(time_to_accuracy, "run_heat", run_heat)
    what = (["vision", "text"], ["none", "kgt"], [0, 1], FULL, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        time_to_accuracy.run_all(*what)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('\n{"workload": "torn')
    assert len(finished_runs(tmp_path / "runs.jsonl", FULL)) == 5
    assert time_to_accuracy.run_all(*what) == []
    assert len(finished_runs(tmp_path / "runs.jsonl", FULL)) == 8
    both = ("none", "kgt")
    assert heats[:3] == [("vision", 0, *both), ("text", 0, *both), ("vision", 1, *both)]
    assert heats[3:] == [("vision", 1, "kgt"), ("text", 1, *both)]


def test_runs_of_another_size_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    small = settings("vision", quick=False, changed={"train-images": 10})
    # As JSON gives it back: the settings must survive the way through the file.
    path.write_text(json.dumps({"workload": "vision", "policy": "none", "seed": 0, "settings": small}) + "\n")
    assert finished_runs(path, FULL) == []
    assert [r["settings"] for r in finished_runs(path, {"vision": small})] == [small]


def test_a_plain_run_of_another_arithmetic_is_not_finished_here(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"workload": "vision", "policy": p, "seed": 0, "arithmetic": "AVX512"} for p in ("none", "kgt")]
    monkeypatch.setattr(time_to_accuracy, "arithmetic", lambda: "AVX2")
    assert not is_finished(records, "vision", "none", 0) and is_finished(records, "vision", "kgt", 0)
    monkeypatch.setattr(time_to_accuracy, "arithmetic", lambda: "AVX512")
    assert is_finished(records, "vision", "none", 0) and not is_finished(records, "vision", "none", 1)


def test_an_unknown_workload_is_refused_with_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        time_to_accuracy.main(["--workloads", "speech"])
    assert "no workload speech: choose from vision, text" in capsys.readouterr().err
