from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import epoch_gate
from benchmarks.accuracy_jobs import command, environment, settings


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
    gate = found.index(str(Path(epoch_gate.__file__)))
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


def test_the_pace_is_the_plain_job() -> None:
    assert line("pace")[5:] == line("none")[5:], "all but the port"


def test_settings_of_the_caller_do_not_reach_the_runs() -> None:
    environ = {"KGTRUN_OFF": "1", "KGTRUN_LANGUAGE_DIR": "d", "OMP_NUM_THREADS": "7", "HOME": "h"}
    found = environment({"threads_per_rank": 2}, environ)
    assert found == {"KGTRUN_LANGUAGE_DIR": "d", "OMP_NUM_THREADS": "2", "HOME": "h"}
