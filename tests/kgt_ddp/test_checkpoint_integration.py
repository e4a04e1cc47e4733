"""torch.distributed.checkpoint: `{"freezing": ddp.freezing}` resumes as torch.save does, also on other numbers of ranks.

It loads key by key into the state of the fresh job, and of a key that several ranks have it saves any rank's. The policy
here decides by what it has seen, in a list that grows, and as every policy it sees something on rank 0 only.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from kgt_ddp import FreezeAwareDDP
from kgt_ddp.policies.policy import Decision
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import OPTIMIZERS, differing, snapshot, told, train

pytestmark = pytest.mark.integration

STOP, STEPS = 13, 26


class Remembering:
    """One more block at every second decision."""

    signals = ()
    needs_total_steps = False

    def __init__(self):
        self.seen = []

    def decide(self, observation):
        self.seen.append({"step": observation.step, "frontier": observation.frontier})
        return Decision(frontier=min(len(self.seen) // 2, 3), reason="by number of decisions")

    def state_dict(self):
        return {"seen": list(self.seen), "last": self.seen[-1] if self.seen else None}

    def load_state_dict(self, state):
        assert (state["seen"] or [None])[-1] == state["last"]
        self.seen = list(state["seen"])


def fresh(optimizer="sgd"):
    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet(), policy=Remembering(), interval=3)
    return ddp, OPTIMIZERS[optimizer](ddp.parameters())


def equal_buffers(ddp):
    """DDP makes buffers equal at the next forward only, and a checkpoint may be given any rank's."""
    for buffer in ddp.module.buffers():
        dist.broadcast(buffer, 0)


def whole_state(ddp, optimizer, freezing):
    model, optim = get_state_dict(ddp, optimizer)
    return {"model": model, "optimizer": optim, "freezing": freezing}


def outcome(ddp, optimizer, rank, steps):
    train(ddp, optimizer, rank=rank, steps=steps)
    equal_buffers(ddp)
    summary = ddp.freezing.summary()
    return snapshot(ddp.module), summary["freezes"], summary["dropped_bytes"]


def save_and_go_on(rank, world, folder, optimizer):
    ddp, optim = fresh(optimizer)
    train(ddp, optim, rank=rank, steps=range(STOP))
    equal_buffers(ddp)
    dcp.save(whole_state(ddp, optim, ddp.freezing), checkpoint_id=f"{folder}/object")
    dcp.save(whole_state(ddp, optim, ddp.freezing.state_dict()), checkpoint_id=f"{folder}/dict")
    if rank == 0:
        saved = {"model": ddp.module.state_dict(), "optimizer": optim.state_dict()}
        torch.save({**saved, "freezing": ddp.freezing.state_dict()}, f"{folder}/file.pt")
    dist.barrier()
    return outcome(ddp, optim, rank, range(STOP, STEPS))


def resume(rank, world, folder, optimizer, form):
    ddp, optim = fresh(optimizer)
    if form == "file":
        saved = torch.load(f"{folder}/file.pt", weights_only=True)
        ddp.module.load_state_dict(saved["model"])
        optim.load_state_dict(saved["optimizer"])
        ddp.freezing.load_state_dict(saved["freezing"])
    else:
        state = whole_state(ddp, optim, ddp.freezing if form == "object" else ddp.freezing.state_dict())
        dcp.load(state, checkpoint_id=f"{folder}/{form}")
        set_state_dict(ddp, optim, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if form == "dict":
            ddp.freezing.load_state_dict(state["freezing"])
    return outcome(ddp, optim, rank, range(STOP, STEPS))


def assert_same(found, expected):
    for (weights, freezes, dropped), (other_weights, other_freezes, other_dropped) in zip(found, expected, strict=True):
        assert freezes == other_freezes
        assert dropped == other_dropped
        assert differing(weights, other_weights) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_distributed_checkpoint_resumes_as_torch_save_does(run_ranks, tmp_path, optimizer):
    whole = run_ranks(2, save_and_go_on, str(tmp_path), optimizer)
    freezes = [(entry["step"], entry["frontier"]) for entry in whole[0][1]]
    assert freezes[0][0] < STOP < freezes[-1][0], "something froze on either side of the stop"
    for form in ("file", "object", "dict"):
        assert_same(run_ranks(2, resume, str(tmp_path), optimizer, form), whole)
    alone = run_ranks(1, resume, str(tmp_path), optimizer, "file")
    assert [entry["frontier"] for entry in alone[0][1]] == [frontier for _, frontier in freezes]
    for form in ("object", "dict"):
        assert_same(run_ranks(1, resume, str(tmp_path), optimizer, form), alone)


def without_freezing(rank, world, folder):
    messages = told()
    ddp, optim = fresh()
    dcp.save({"model": ddp.module.state_dict()}, checkpoint_id=folder)
    state = {"model": ddp.module.state_dict(), "freezing": ddp.freezing}
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    train(ddp, optim, rank=rank, steps=range(2))
    return ddp.freezing.frontier, messages


def test_a_distributed_checkpoint_without_freezing_loads_unfrozen_and_says_so(run_ranks, tmp_path):
    ((frontier, messages),) = run_ranks(1, without_freezing, str(tmp_path))
    assert frontier == 0
    assert any("nothing frozen" in message for message in messages)


def saved_by_the_wrong_rank(rank, world):
    messages = told()
    ddp, optim = fresh()
    train(ddp, optim, rank=rank, steps=range(STOP))
    state = [ddp.freezing.state_dict()]
    dist.broadcast_object_list(state, src=1)
    again, _ = fresh()
    again.freezing.load_state_dict(state[0])
    return messages


def test_a_state_that_rank_0_did_not_save_lacks_the_policys_memory_and_says_so(run_ranks):
    messages, others = run_ranks(2, saved_by_the_wrong_rank)
    assert any("without its memory" in message for message in messages)
    assert not others
