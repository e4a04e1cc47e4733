"""A listening policy hears the reference process and the gradient norms of all ranks, in a live training job."""

from __future__ import annotations

import signal
import time
from typing import ClassVar

import pytest
import torch

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.policy import Decision
from kgtrun.contract.events import read_events
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.reference.conftest import Reference
from tests.kgt_ddp.training import OPTIMIZERS, train

pytestmark = pytest.mark.integration


class Listener:
    """Freezes two blocks at step 20 and remembers what it heard."""

    signals: ClassVar = ("plasticity", "plasticity_2", "plasticity_4", "floor", "grad_norm")
    needs_total_steps: ClassVar = False

    def __init__(self):
        self.heard = []

    def decide(self, observation):
        self.heard.append(observation)
        return Decision(frontier=2 if observation.step >= 20 else 0, reason="test", numbers={})

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.fixture
def reference(tmp_path):
    made = Reference(tmp_path)
    made.start()
    yield made
    made.stop()
    assert not made.path.exists()


def listening(rank, world, steps):
    torch.manual_seed(3)
    policy = Listener()
    ddp = FreezeAwareDDP(SmallResNet(), policy=policy, interval=3, total_steps=steps)
    norms = []

    def keep(step):
        norms.append(
            [sum(p.grad.abs().sum().item() for p in b.parameters() if p.grad is not None) for b in ddp.module.blocks]
        )

    train(ddp, OPTIMIZERS["sgd"](ddp.parameters()), rank=rank, steps=range(steps), before_step=keep)
    heard = [(o.step, o.lag_steps, o.block_seconds, o.learning_rate, dict(o.signals)) for o in policy.heard]
    stats = ddp.freezing.summary()["reference"]
    ddp.freezing.close()
    return heard, norms, stats, ddp.freezing.frontier


def env(reference, **more):
    return {"KGTRUN_REFERENCE_DIR": str(reference.directory), "KGTRUN_NUM_REFERENCES": "1", **more}


def test_scores_and_norms_of_all_ranks_reach_the_policy(run_ranks, reference, tmp_path):
    run_dir = str(tmp_path / "events_of_trainers")
    results = run_ranks(
        2, listening, 45, env=env(reference, KGTRUN_DETERMINISTIC="1", KGTRUN_RUN_DIR=run_dir), timeout_s=150
    )
    heard, _, stats, frontier = results[0]
    assert results[1][0] == [], "only rank 0 decides"
    assert frontier == 2
    assert stats["scores"] > 0
    assert stats["dropped"] == 0
    steps = [step for step, *_ in heard]
    assert steps == sorted(steps)
    last_step, lag, block_seconds, learning_rate, signals = heard[-1]
    assert lag == 6
    assert learning_rate == 0.05
    assert block_seconds is None, "a repeatable run measures no time"
    for name in ("plasticity", "plasticity_2", "plasticity_4"):
        assert all(v is not None and v >= 0 for v in signals[name][:4]), name
        assert signals[name][4] is None, "the last block is not watched"
    assert signals["plasticity"][0] == 0.0, "a frozen block does not move"
    assert signals["plasticity"][3] > 0
    assert signals["grad_norm"][0] is None
    assert signals["grad_norm"][3] > 0
    kinds = {e["kind"] for e in read_events(run_dir)}
    assert {"blocks", "score", "decision", "apply", "trainer_end"} <= kinds


def test_grad_norm_is_the_mean_over_ranks_of_the_sum_over_the_interval(run_ranks, reference):
    results = run_ranks(2, listening, 8, env=env(reference), timeout_s=100)
    (heard, norms0, *_), (_, norms1, *_) = results
    step, *_, signals = heard[1]
    assert step == 5, "decided one step after the collection at step 4"
    expected = [sum(n[block] for n in norms[1:4]) for norms in (norms0, norms1) for block in range(1, 4)]
    mean = [(a + b) / 2 for a, b in zip(expected[:3], expected[3:], strict=True)]
    assert signals["grad_norm"][1:4] == pytest.approx(mean, rel=1e-4)


def test_without_a_reference_scores_are_unknown_and_training_goes_on(run_ranks):
    (heard, _, stats, frontier), *_ = run_ranks(1, listening, 12)
    assert frontier == 0
    assert stats == {}
    assert all(v is None for *_, signals in heard for v in signals["plasticity"])
    *_, (_, _, block_seconds, _, _) = heard
    assert len(block_seconds) == 5
    assert sum(block_seconds) > 0


def reporting(rank, world):
    policy = Listener()
    ddp = FreezeAwareDDP(SmallResNet(), policy=policy, interval=3, total_steps=12)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    for step in range(12):
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        ddp.freezing.observe_loss(torch.tensor(float(100 * rank + step)))
    return [(o.step, o.loss) for o in policy.heard]


def test_losses_that_the_script_reports_reach_the_policy_as_means_between_decisions(run_ranks):
    heard, nothing = run_ranks(2, reporting)
    assert nothing == []
    steps = [step for step, _ in heard]
    begins = [0, *steps]
    assert len(steps) >= 3
    assert [loss for _, loss in heard] == [
        sum(range(begin, end)) / (end - begin) for begin, end in zip(begins, steps, strict=False)
    ]


def connecting(rank, world, total_steps):
    ddp = FreezeAwareDDP(SmallResNet(), policy="kgt", total_steps=total_steps)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    train(ddp, optimizer, rank=rank, steps=range(10))
    stats = ddp.freezing.summary()["reference"]
    ddp.freezing.close()
    return stats


def test_a_job_too_short_to_freeze_in_does_not_trouble_the_reference(run_ranks, reference):
    assert run_ranks(1, connecting, 200, env=env(reference)) == [{}]
    (stats,) = run_ranks(1, connecting, 201, env=env(reference))
    assert stats["submitted"] > 0


def pacing(rank, world):
    """A job whose scheduler says that it has 6,000 steps; two decisions after that are enough."""
    torch.manual_seed(3)
    policy = Listener()
    ddp = FreezeAwareDDP(SmallResNet(), policy=policy)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6_000)
    for step in range(170):
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        schedule.step()
    state = ddp.freezing.state_dict()["shared"][0]["agreement"]
    ddp.freezing.close()
    return [(o.step, o.lag_steps, o.signals["plasticity_2"][3]) for o in policy.heard], state["interval"]


def test_a_length_that_is_learned_lengthens_interval_and_distances_on_all_ranks(run_ranks, reference, tmp_path):
    run_dir = str(tmp_path / "events_of_trainers")
    results = run_ranks(2, pacing, env=env(reference, KGTRUN_DETERMINISTIC="1", KGTRUN_RUN_DIR=run_dir), timeout_s=200)
    assert [interval for _, interval in results] == [40, 40]
    changes = [(e["step"], e["was"], e["interval"]) for e in read_events(run_dir) if e["kind"] == "interval"]
    assert len(changes) == 2 and changes[0] == changes[1], "at the same step on both ranks"
    assert changes[0][1:] == (10, 40)
    heard = [entry for entry in results[0][0] if entry[0] > changes[0][0]]
    assert [step % 40 for step, *_ in heard] == [1] * len(heard)
    assert {lag for _, lag, _ in heard} == {40}
    # The score of step 80 would be against step 0; that of step 120 is against step 40.
    assert next(step for step, _, score in heard if score is not None) == 161


class SlowToEvaluate(SmallResNet):
    """Training goes on several steps while the reference's forward, in evaluation mode, sleeps."""

    def forward(self, x):
        if not self.training:
            time.sleep(1.0)
        return super().forward(x)


def outrunning(rank, world):
    torch.manual_seed(3)
    policy = Listener()
    ddp = FreezeAwareDDP(SlowToEvaluate(), policy=policy, total_steps=1_500)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    for step in range(300):
        train(ddp, optimizer, rank=rank, steps=range(step, step + 1))
        time.sleep(0.06)
    ddp.freezing.close()
    return [(o.step, o.lag_steps, o.signals["plasticity"][3]) for o in policy.heard]


def test_a_reference_that_is_slower_than_the_interval_is_asked_less_often(run_ranks, reference, tmp_path):
    """At 10 steps, 0.6 s, two of three submits would be passed over, and what is kept of them is never a lag apart."""
    run_dir = str(tmp_path / "events_of_trainers")
    heard, _ = run_ranks(2, outrunning, env=env(reference, KGTRUN_RUN_DIR=run_dir), timeout_s=200)
    changes = [(e["step"], e["was"], e["interval"]) for e in read_events(run_dir) if e["kind"] == "interval"]
    assert len(changes) == 2 and changes[0] == changes[1], "at the same step on both ranks"
    step, was, interval = changes[0]
    assert was == 10 and interval == 20, "the longest that leaves 75 decisions"
    later = [(lag, score) for at, lag, score in heard if at > step + 4 * interval]
    assert {lag for lag, _ in later} == {20}, "the same distances as before"
    assert any(score is not None for _, score in later)


def killed(rank, world, steps, pid):
    import os

    torch.manual_seed(3)
    policy = Listener()
    ddp = FreezeAwareDDP(SmallResNet(), policy=policy, interval=3, total_steps=steps)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    train(ddp, optimizer, rank=rank, steps=range(10))
    if rank == 0:
        os.kill(pid, signal.SIGKILL)
    train(ddp, optimizer, rank=rank, steps=range(10, steps))
    return ddp.freezing.clock.step, ddp.freezing.frontier


def test_a_killed_reference_does_not_stop_training_or_a_pending_mask(run_ranks, tmp_path):
    reference = Reference(tmp_path)
    process = reference.start()
    try:
        assert run_ranks(2, killed, 40, process.pid, env=env(reference), timeout_s=150) == [(40, 2)] * 2
    finally:
        reference.stop()
