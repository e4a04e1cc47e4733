from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.freeze_time import PLANS, Branches, Job, Plan, ResNet, Training, finished_runs, summarise

TINY = Job(num_train=64, num_held_out=32, epochs=2, batch_size=4, width=2)


@pytest.fixture(scope="module")
def branches() -> Branches:
    made = torch.Generator().manual_seed(0)
    images, labels = torch.randn(100, 1, 8, 8, generator=made), torch.randint(10, (100,), generator=made)
    return Branches(TINY, 3, images, labels)


def test_a_branch_in_which_nothing_freezes_is_the_training_itself(branches: Branches) -> None:
    found = branches.run(
        {
            "never": Plan(((0.4, 0), (2.0, 8))),
            "all": Plan(((0.4, 8),)),
            "all once more": Plan(((0.4, 8),)),
            "all at their mean": Plan(((0.4, 8),), at_mean=True),
            "mid-epoch": Plan(((0.7, 0),)),
        }
    )
    assert found["never"] == found["plain"] == found["mid-epoch"] | {"train_loss": found["plain"]["train_loss"]}
    assert found["all"] == found["all once more"] != found["plain"]
    assert found["all at their mean"] != found["all"]


def test_what_is_frozen_gets_no_gradient_and_keeps_its_statistics() -> None:
    net = ResNet(blocks_per_stage=3, width=2)
    images = torch.randn(4, 1, 8, 8)
    training = Training(net, 0.1, images)
    training.freeze(4, at_mean=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training.step(0, 0.1, images, torch.arange(4))
    moved = {name.split(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"stage2", "stage3", "head"}
    without = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is None}
    assert without == {"stem", "stage1", "stage2"}  # stage2.0 is the fourth block


def run(seed: int, accuracy: float) -> dict[str, Any]:
    found = {"plain": {"accuracy": 90.0, "loss": 0.3, "train_loss": 0.1}}
    found |= {name: {"accuracy": accuracy, "loss": 0.25, "train_loss": 0.2} for name in PLANS}
    return {"seed": seed, "job": asdict(TINY), "found": found}


def test_plans_are_compared_with_the_training_of_their_seed(capsys: pytest.CaptureFixture[str]) -> None:
    summarise([run(0, 89.5), run(1, 89.9), run(2, 89.7)]).publish(quick=True)
    figures = json.loads(capsys.readouterr().out)
    assert figures["linear_accuracy_change"] == pytest.approx(-0.3)
    assert figures["front_loss_change"] == pytest.approx(-0.05)
    assert figures["num_seeds"] == 3


def test_finished_seeds_of_the_same_size_are_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    other = run(1, 89.0) | {"job": asdict(Job())}
    fewer_plans = run(2, 89.0)
    del fewer_plans["found"]["linear"]
    path.write_text("\n" + "\n".join(json.dumps(one) for one in (run(0, 89.0), other, fewer_plans)) + "\n{torn")
    assert list(finished_runs(path, TINY)) == [0]
