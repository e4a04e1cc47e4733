from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import real_job
from benchmarks.real_job import Job


def record(case: str, seed: int, job: Job, *, wall_s: float = 100.0, accuracy: float = 0.9) -> dict[str, Any]:
    result: dict[str, Any] = {"accuracy": accuracy, "train_wall_s": wall_s / 2}
    if case != "plain":
        result["freezing"] = {"reduced_bytes": 300, "dropped_bytes": 100}
    return {
        "case": case,
        "seed": seed,
        "job": vars(job),
        "commit": "abc",
        "cost": {"wall_s": wall_s, "cpu_s": 2 * wall_s, "exit_code": 0, "num_outlived": 0},
        "result": result,
    }


def test_plain_is_stock_ddp_under_torchrun() -> None:
    line = real_job.command("plain", Job(), 3, run_dir=Path("r"), figures=Path("f.json"))
    assert line[1:3] == ["-m", "torch.distributed.run"]
    assert line[-1] == "--stock-ddp"
    assert "kgtrun" not in line


def test_linear_is_the_schedule_of_the_issue_and_otherwise_the_same_job() -> None:
    plain = real_job.command("plain", Job(), 3, run_dir=Path("r"), figures=Path("f.json"))
    linear = real_job.command("linear", Job(), 3, run_dir=Path("r"), figures=Path("f.json"))
    assert linear[linear.index("--policy") + 1] == "linear:start=0.25,stop=0.75,fraction=0.8"
    script = str(real_job.SCRIPT)
    assert linear[linear.index(script) :] == plain[plain.index(script) : -1]


def test_settings_of_the_caller_do_not_reach_the_runs() -> None:
    environ = {"KGTRUN_OFF": "1", "KGTRUN_FASHION_MNIST_DIR": "d", "OMP_NUM_THREADS": "7", "HOME": "h"}
    found = real_job.environment(Job(threads_per_rank=2), environ)
    assert found == {"KGTRUN_FASHION_MNIST_DIR": "d", "OMP_NUM_THREADS": "2", "HOME": "h"}


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_once(case: str, job: Job, seed: int, folder: Path) -> dict[str, Any]:
        ran.append((case, seed))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return record(case, seed, job)

    monkeypatch.setattr(real_job, "run_once", run_once)
    cases, seeds = ["plain", "linear"], [0, 1]
    with pytest.raises(KeyboardInterrupt):
        real_job.run_all(cases, seeds, Job(), tmp_path)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('\n{"case": "torn')
    assert len(real_job.finished_runs(tmp_path / "runs.jsonl", Job())) == 2
    runs = real_job.run_all(cases, seeds, Job(), tmp_path)
    assert set(runs) == {("plain", 0), ("linear", 0), ("plain", 1), ("linear", 1)}
    assert real_job.finished_runs(tmp_path / "runs.jsonl", Job()) == runs
    assert ran == [("plain", 0), ("linear", 0), ("linear", 1), ("linear", 1), ("plain", 1)]


def test_runs_of_another_size_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(record("plain", 0, Job(epochs=3))) + "\n")
    assert real_job.finished_runs(path, Job()) == {}
    assert list(real_job.finished_runs(path, Job(epochs=3))) == [("plain", 0)]


def test_gains_are_taken_seed_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job()
    walls = {("plain", 0): 100.0, ("linear", 0): 80.0, ("plain", 1): 300.0, ("linear", 1): 200.0}
    scores = {("plain", 0): 0.92, ("linear", 0): 0.91, ("plain", 1): 0.90, ("linear", 1): 0.91}
    runs = {key: record(*key, job, wall_s=wall, accuracy=scores[key]) for key, wall in walls.items()}
    real_job.summarise(runs, ["plain", "linear"], [0, 1]).publish(quick=True)
    figures = json.loads(capsys.readouterr().out)
    assert figures["plain_over_linear_wall"] == pytest.approx((1.25 + 1.5) / 2)
    assert figures["linear_accuracy_change_points"] == pytest.approx(0.0, abs=1e-9)
    assert figures["linear_bytes_dropped_share"] == 0.25
    assert figures["num_seeds"] == 2


def test_an_unknown_case_is_refused_with_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        real_job.main(["--cases", "plain,kgtt"])
    assert "no case kgtt: choose from plain, linear, none" in capsys.readouterr().err
