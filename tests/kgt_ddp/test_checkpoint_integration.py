"""torch.distributed.checkpoint: `{"freezing": ddp.freezing}` resumes as torch.save does, also on other numbers of ranks.

It loads key by key into the state of the fresh job, and of a key that several ranks have it saves any rank's. The policy
here decides by what it has seen, in a list that grows, and as every policy it sees something on rank 0 only.
"""

from __future__ import annotations

import os

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
OFF = {"KGTRUN_OFF": "1"}
FORMS = ("file", "object", "dict")
"""torch.save; torch.distributed.checkpoint of the freezing itself, and of its state."""


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


def load_model(ddp, optim, folder, form):
    """Weights, optimizer and freezing from a checkpoint, as a script does it, freezing or not."""
    if form == "file":
        saved = torch.load(f"{folder}/file.pt", weights_only=True)
        ddp.module.load_state_dict(saved["model"])
        optim.load_state_dict(saved["optimizer"])
        ddp.freezing.load_state_dict(saved["freezing"])
        return
    state = whole_state(ddp, optim, ddp.freezing if form == "object" else ddp.freezing.state_dict())
    dcp.load(state, checkpoint_id=f"{folder}/{form}")
    set_state_dict(ddp, optim, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if form == "dict":
        ddp.freezing.load_state_dict(state["freezing"])


def save_model(ddp, optim, folder, form, rank):
    equal_buffers(ddp)
    if form != "file":
        freezing = ddp.freezing if form == "object" else ddp.freezing.state_dict()
        dcp.save(whole_state(ddp, optim, freezing), checkpoint_id=f"{folder}/{form}")
    elif rank == 0:
        saved = {"model": ddp.module.state_dict(), "optimizer": optim.state_dict()}
        torch.save({**saved, "freezing": ddp.freezing.state_dict()}, f"{folder}/file.pt")


def save_and_go_on(rank, world, folder, optimizer):
    ddp, optim = fresh(optimizer)
    train(ddp, optim, rank=rank, steps=range(STOP))
    for form in FORMS:
        save_model(ddp, optim, folder, form, rank)
    dist.barrier()
    return outcome(ddp, optim, rank, range(STOP, STEPS))


def resume(rank, world, folder, optimizer, form):
    ddp, optim = fresh(optimizer)
    load_model(ddp, optim, folder, form)
    return outcome(ddp, optim, rank, range(STOP, STEPS))


def assert_same(found, expected):
    for (weights, freezes, dropped), (other_weights, other_freezes, other_dropped) in zip(found, expected, strict=True):
        assert freezes == other_freezes
        assert dropped == other_dropped
        assert differing(weights, other_weights) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"] if os.environ.get("KGTRUN_FULL_TESTS") else ["adamw"])
def test_a_distributed_checkpoint_resumes_as_torch_save_does(run_ranks, tmp_path, optimizer):
    whole = run_ranks(2, save_and_go_on, str(tmp_path), optimizer)
    freezes = [(entry["step"], entry["frontier"]) for entry in whole[0][1]]
    assert freezes[0][0] < STOP < freezes[-1][0], "something froze on either side of the stop"
    for form in FORMS:
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
    ((frontier, messages),) = run_ranks(1, without_freezing, str(tmp_path / "on"))
    assert frontier == 0
    assert any("nothing frozen" in message for message in messages)
    ((frontier, messages),) = run_ranks(1, without_freezing, str(tmp_path / "off"), env=OFF)
    assert frontier == 0 and not any("checkpoint" in message for message in messages)


def one_leg(rank, world, source, target, form, steps):
    """A job from the checkpoint in `source`, if any, to that in `target`: what it said, had loaded, and ended with."""
    messages = told()
    ddp, optim = fresh()
    if source is not None:
        load_model(ddp, optim, source, form)
    loaded = snapshot(ddp.module)
    train(ddp, optim, rank=rank, steps=range(steps.start, steps.start + 1))
    frontier = ddp.freezing.frontier
    train(ddp, optim, rank=rank, steps=range(steps.start + 1, steps.stop))
    save_model(ddp, optim, target, form, rank)
    policy = ddp.freezing.state_dict().get("rank_0")
    return messages, loaded, frontier, snapshot(ddp.module), ddp.freezing.summary()["freezes"], policy


@pytest.mark.parametrize("form", ["object", "file"])
def test_a_job_with_freezing_off_in_between_loses_nothing_and_says_what_happens(run_ranks, tmp_path, form):
    folders = [tmp_path / name for name in ("on", "off", "again")]
    for folder in folders:
        folder.mkdir()
    on, off, again = map(str, folders)
    first = run_ranks(2, one_leg, None, on, form, range(STOP))
    between = run_ranks(2, one_leg, on, off, form, range(STOP, STOP + 4), env=OFF)
    last = run_ranks(2, one_leg, off, again, form, range(STOP + 4, STEPS))
    frozen = first[0][4][-1]["frontier"]
    assert frozen > 0
    for rank in range(2):
        messages, loaded, frontier, ended, freezes, _ = between[rank]
        assert any(f"{frozen} frozen blocks; freezing is off (KGTRUN_OFF is set)" in message for message in messages)
        assert differing(loaded, first[rank][3]) == [] and frontier == 0 and freezes == []
        assert differing(ended, loaded), "everything trained"
        messages, loaded, frontier, _, freezes, _ = last[rank]
        assert any(
            f"saved with freezing off (KGTRUN_OFF is set): {frozen} blocks freeze again, as at step {STOP}" in message
            for message in messages
        )
        assert differing(loaded, ended) == [] and frontier == frozen
        assert freezes[: len(first[rank][4])] == first[rank][4] and len(freezes) > len(first[rank][4])
    seen, before = (leg[0][5][0]["policy"]["seen"] for leg in (last, first))
    assert seen[: len(before)] == before, "the policy remembers what it saw before freezing was off"


@pytest.mark.parametrize("form", ["object", "file"])
def test_a_checkpoint_of_a_job_that_never_froze_loads_unfrozen_and_says_so(run_ranks, tmp_path, form):
    folders = [tmp_path / name for name in ("off", "on")]
    for folder in folders:
        folder.mkdir()
    off, on = map(str, folders)
    first = run_ranks(1, one_leg, None, off, form, range(2), env=OFF)
    ((messages, loaded, frontier, _, freezes, _),) = run_ranks(1, one_leg, off, on, form, range(2, 20))
    (said,) = [message for message in messages if "checkpoint" in message]
    assert (
        said == "the checkpoint was saved with freezing off (KGTRUN_OFF is set): training goes on with nothing frozen"
    )
    assert differing(loaded, first[0][3]) == [] and frontier == 0
    assert freezes, "and freezes as any other"


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
