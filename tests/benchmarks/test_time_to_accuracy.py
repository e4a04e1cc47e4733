from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run_log, time_to_accuracy
from benchmarks.machine import arithmetic
from benchmarks.time_to_accuracy import command, environment, finished_runs, is_finished, parse_policies, settings
from benchmarks.turns import JobFailed, Turn

FULL = {name: settings(name, quick=False, changed={}) for name in time_to_accuracy.WORKLOADS}


def line(policy: str, **changed: Any) -> list[str]:
    chosen = settings("vision", quick=False, changed=changed)
    return command(policy, chosen, 3, folder=Path("folder"), name="name")


def test_plain_is_stock_ddp_under_torchrun() -> None:
    found = line("none")
    assert found[1:3] == ["-m", "torch.distributed.run"]
    assert found[-1] == "--stock-ddp"
    assert "kgtrun" not in found


def test_a_policy_runs_the_same_script_under_kgtrun_without_cache_or_hang_watch() -> None:
    plain, found = line("none"), line("linear:start=0.3,stop=0.7")
    gate = found.index(str(Path(time_to_accuracy.epoch_gate.__file__)))
    assert found[gate:] == plain[plain.index(found[gate]) : -1]
    assert found[found.index("--policy") + 1] == "linear:start=0.3,stop=0.7"
    assert found[found.index("--cache") + 1] == "off"
    assert found[found.index("--hang-timeout") + 1] == "0"


def test_the_cache_is_asked_for_by_a_suffix() -> None:
    found = line("kgt+cache")
    assert found[found.index("--policy") + 1] == "kgt"
    assert found[found.index("--cache") + 1] == "auto"


def test_sizes_given_on_the_command_line_reach_the_script_that_has_them() -> None:
    found = line("none", **{"train-images": 100, "train-texts": 50, "epochs": None})
    assert found[found.index("--train-images") + 1] == "100"
    assert found[found.index("--epochs") + 1] == "10"
    assert "--train-texts" not in found


def test_policies_are_split_at_commas_that_are_not_their_own() -> None:
    assert parse_policies("none, linear:start=0.3,stop=0.7,kgt") == ["none", "linear:start=0.3,stop=0.7", "kgt"]


def test_settings_of_the_caller_do_not_reach_the_runs() -> None:
    environ = {"KGTRUN_OFF": "1", "KGTRUN_LANGUAGE_DIR": "d", "OMP_NUM_THREADS": "7", "HOME": "h"}
    found = environment({"threads_per_rank": 2}, environ)
    assert found == {"KGTRUN_LANGUAGE_DIR": "d", "OMP_NUM_THREADS": "2", "HOME": "h"}


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
    monkeypatch.setattr(time_to_accuracy, "Job", FakeJob)
    monkeypatch.setattr(FakeJob, "order", [])
    policies = ["none", "static:blocks=1,step=2", "kgt"]
    failures = time_to_accuracy.run_heat("vision", policies, 0, FULL["vision"], tmp_path)
    assert failures == ["vision-static_blocks_1_step_2-seed0 ended with exit code 1"]
    found = finished_runs(tmp_path / "runs.jsonl", FULL)
    assert [record["policy"] for record in found] == ["none", "kgt"]
    plain, broken, kgt = (time_to_accuracy.run_name("vision", policy, 0) for policy in policies)
    assert FakeJob.order == [plain, broken, kgt, kgt, plain, plain, kgt]


def test_where_plain_is_from_another_heat_a_plain_job_takes_two_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_to_accuracy, "Job", FakeJob)
    monkeypatch.setattr(FakeJob, "order", [])
    monkeypatch.setattr(FakeJob, "places", ("start", *map(str, range(10)), "exit"))
    assert time_to_accuracy.run_heat("vision", ["kgt"], 0, FULL["vision"], tmp_path) == []
    pace, kgt = (time_to_accuracy.run_name("vision", policy, 0) for policy in ("pace", "kgt"))
    assert [i for i, name in enumerate(FakeJob.order) if name == pace] == [0, 3, 8]
    assert FakeJob.order.count(kgt) == 12
    (record,) = finished_runs(tmp_path / "runs.jsonl", FULL)
    assert record["arithmetic"] == arithmetic()
    assert [turn["place"] for turn in record["pace"]] == ["start", "0", "1"]
    assert line("pace")[5:] == line("none")[5:], "all but the port"
