"""The examples run under torchrun as they do under kgtrun, on a data set of a few hundred images."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.process_cost import run_process
from tests.stock_torch import run_to_an_orderly_end

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KGTRUN = [sys.executable, "-m", "kgtrun", "--nproc-per-node", "2"]


def run(command: list[str], cwd: Path) -> str:
    """Output of a command that must succeed and leave no process behind."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("KGTRUN_")} | {"OMP_NUM_THREADS": "1"}
    log = cwd / "output.log"

    def attempt() -> tuple[int, str]:
        with log.open("w") as output:
            cost = run_process(command, timeout_s=180, env=env, cwd=cwd, output=output)
        assert cost.num_outlived == 0, log.read_text()
        return cost.exit_code, log.read_text()

    code, text = run_to_an_orderly_end(attempt) if "--stock-ddp" in command else attempt()
    assert code == 0, text
    return text


def train(launcher: list[str], data: Path, cwd: Path, *options: str) -> tuple[str, dict[str, Any]]:
    figures = cwd / "figures.json"
    sizes = ["--epochs", "4", "--batch-size", "32", "--train-images", "256", "--test-images", "101"]
    script = [str(EXAMPLES / "fashion_resnet.py"), "--data", str(data), *sizes, "--json-out", str(figures), *options]
    return run([*launcher, *script], cwd), json.loads(figures.read_text())


def test_stock_ddp_under_torchrun(tiny_fashion: Path, tmp_path: Path) -> None:
    text, figures = train(TORCHRUN, tiny_fashion, tmp_path, "--stock-ddp", "--augment")
    assert "stock DistributedDataParallel" in text
    assert "freezing" not in figures
    assert figures["steps"] == 32
    assert figures["accuracy"] > 0.5
    assert len(figures["epochs"]) == 4
    assert figures["accuracy"] == figures["epochs"][-1]["accuracy"], "the last validation was on the whole test set"


def test_under_torchrun_nothing_is_frozen_and_it_says_why(tiny_fashion: Path, tmp_path: Path) -> None:
    text, figures = train(TORCHRUN, tiny_fashion, tmp_path)
    assert "blocks frozen    none: started without kgtrun" in text
    assert not figures["freezing"]["active"]


def test_under_kgtrun_the_schedule_freezes_eight_of_ten_blocks(tiny_fashion: Path, tmp_path: Path) -> None:
    text, figures = train([*KGTRUN, "--policy", "linear"], tiny_fashion, tmp_path)
    freezing = figures["freezing"]
    assert (freezing["num_blocks"], freezing["frontier"], freezing["steps"]) == (10, 8, 32)
    assert freezing["dropped_bytes"] > 0
    assert figures["accuracy"] > 0.3
    assert "8 of 10 blocks frozen" in text
    assert "left out" in text


def test_minilm_freezes_its_front_and_learns(tiny_language: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    sizes = ["--epochs", "6", "--batch-size", "8", "--train-texts", "200", "--test-texts", "60", "--val-texts", "20"]
    script = [str(EXAMPLES / "minilm_newsgroups.py"), "--data", str(tiny_language), *sizes, "--lr", "3e-3"]
    policy = ["--policy", "linear:start=0.5,stop=0.8,fraction=0.67"]
    text = run([*KGTRUN, *policy, *script, "--json-out", str(figures)], tmp_path)
    found = json.loads(figures.read_text())
    assert (found["freezing"]["num_blocks"], found["steps"]) == (4, 150)
    assert found["freezing"]["frontier"] == 2
    assert found["accuracy"] > 0.3
    assert [set(epoch) for epoch in found["epochs"]] == [{"loss", "accuracy", "val_wall_s", "val_cpu_s"}] * 6
    assert found["test_wall_s"] > 0
    assert "2 of 4 blocks frozen" in text
    assert "left out" in text


def test_the_quick_start_of_the_readme_freezes(tmp_path: Path) -> None:
    text = run([*KGTRUN, "--policy", "linear", str(EXAMPLES / "quickstart.py")], tmp_path)
    assert "epoch 7" in text
    assert text.count("frozen   ") == 4
