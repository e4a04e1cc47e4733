from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.freeze_time import VISION, Branches, Plan, Training, finished_runs, summarise
from benchmarks.freeze_workloads import Text, TextJob, Vision, VisionJob, Workload

TINY = VisionJob(num_train=64, num_held_out=32, epochs=2, batch_size=4, width=2)
TINY_TEXT = TextJob(num_train=64, num_held_out=32, epochs=2, batch_size=4, learning_rate=0.01)


class Encoder(nn.Module):
    """Two layers with dropout over the mean of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)) for _ in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head((hidden * mask.unsqueeze(2)).sum(1))


def vision() -> Workload:
    made = torch.Generator().manual_seed(0)
    images, labels = torch.randn(100, 1, 8, 8, generator=made), torch.randint(10, (100,), generator=made)
    return Vision(TINY, 3, images, labels)


def text() -> Workload:
    made = torch.Generator().manual_seed(0)
    texts = [(torch.randint(50, (3 + i % 5,), generator=made).tolist(), i % 20) for i in range(100)]
    return Text(TINY_TEXT, 3, texts, 80, Encoder)


@pytest.mark.parametrize(("make", "most"), [(vision, 8), (text, 2)])
def test_a_branch_in_which_nothing_freezes_is_the_training_itself(make: Any, most: int) -> None:
    found = Branches(make()).run(
        {
            "never": Plan(((0.4, 0), (2.0, most))),
            "all": Plan(((0.4, most),)),
            "all once more": Plan(((0.4, most),)),
            "all at their mean": Plan(((0.4, most),), at_mean=True),
            "mid-epoch": Plan(((0.7, 0),)),
        }
    )
    assert found["never"] == found["plain"] == found["mid-epoch"] | {"train_loss": found["plain"]["train_loss"]}
    assert found["all"] == found["all once more"] != found["plain"]
    assert found["all at their mean"] != found["all"]


def test_what_is_frozen_gets_no_gradient_and_keeps_its_statistics() -> None:
    training = Training(vision())
    net = training.net
    training.freeze(4, at_mean=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training.step(0)
    moved = {name.split(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"stage2", "stage3", "head"}
    without = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is None}
    assert without == {"stem", "stage1", "stage2"}  # stage2.0 is the fourth block


@pytest.mark.parametrize("make", [vision, text])
def test_what_is_trained_on_is_not_held_out_and_each_epoch_sees_all_of_it(make: Any) -> None:
    workload = make()
    epochs = [[workload.samples(step).tolist() for step in range(16 * epoch, 16 * epoch + 16)] for epoch in (0, 1)]
    seen = [sorted(index for batch in epoch for index in batch) for epoch in epochs]
    assert seen[0] == seen[1] == sorted(set(seen[0])) and epochs[0] != epochs[1]
    assert len(seen[0]) == 64 and len(set(workload.held_out.tolist())) == 32
    assert not set(seen[0]) & set(workload.held_out.tolist())


def run(seed: int, accuracy: float) -> dict[str, Any]:
    found = {"plain": {"accuracy": 90.0, "loss": 0.3, "train_loss": 0.1}}
    found |= {name: {"accuracy": accuracy, "loss": 0.25, "train_loss": 0.2} for name in VISION}
    return {"seed": seed, "job": asdict(TINY), "found": found}


def test_plans_are_compared_with_the_training_of_their_seed(capsys: pytest.CaptureFixture[str]) -> None:
    summarise("freeze_time", VISION, [run(0, 89.5), run(1, 89.9), run(2, 89.7)]).publish(quick=True)
    figures = json.loads(capsys.readouterr().out)
    assert figures["linear_accuracy_change"] == pytest.approx(-0.3)
    assert figures["front_loss_change"] == pytest.approx(-0.05)
    assert figures["num_seeds"] == 3


def test_finished_seeds_of_the_same_size_are_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    other = run(1, 89.0) | {"job": asdict(VisionJob())}
    fewer_plans = run(2, 89.0)
    del fewer_plans["found"]["linear"]
    path.write_text("\n" + "\n".join(json.dumps(one) for one in (run(0, 89.0), other, fewer_plans)) + "\n{torn")
    assert list(finished_runs(path, TINY, VISION)) == [0]
