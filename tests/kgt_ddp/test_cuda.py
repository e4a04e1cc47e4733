"""The CUDA paths on one GPU: parity with plain DDP, frozen bits, the profile's events, the copy to the reference, loss
scaling, compiled models. One rank by NCCL, or two by gloo, for NCCL takes one rank a GPU.

Skipped without a CUDA device; docs/development.md says where they ran.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kgt_ddp.reference import page_locks
from kgt_ddp.reference import transfer as transfer_module
from kgt_ddp.reference.arena import Layout, memory_file, named_tensors
from kgt_ddp.reference.page_locks import PageLocks
from kgt_ddp.reference.transfer import Transfer
from kgtrun.contract.events import read_events
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.reference.conftest import Reference
from tests.kgt_ddp.training import OPTIMIZERS, descend, differing, image_batch, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def steps(ddp, optimizer, count, start=0):
    losses = []
    for step in range(start, start + count):
        x, y = (t.cuda() for t in image_batch(step, 0))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def scaled_steps(ddp, optimizer, count):
    """In fp16 with a scaler, whose first scale is so high that it must skip a step or two."""
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    losses = []
    for step in range(count):
        x, y = (t.cuda() for t in image_batch(step, 0))
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(ddp(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, scaler.get_scale()


def with_nccl(fn):
    """Run `fn` as the one rank of an NCCL group."""
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        torch.backends.cudnn.deterministic = True
        return fn()
    finally:
        dist.destroy_process_group()


def plain_and_ours(train):
    """What `train(ddp, optimizer)` returns and leaves, with stock DDP and with ours that freezes nothing."""
    from torch.nn.parallel import DistributedDataParallel

    from kgt_ddp import FreezeAwareDDP

    sides = []
    for wrap in (DistributedDataParallel, lambda m, **kw: FreezeAwareDDP(m, policy="none", interval=3, **kw)):
        torch.manual_seed(3)
        ddp = wrap(SmallResNet().cuda(), device_ids=[0])
        sides.append((train(ddp, OPTIMIZERS["sgd"](ddp.parameters())), snapshot(ddp)))
    return sides


def test_freezing_off_equals_plain_ddp_bit_for_bit():
    sides = with_nccl(lambda: plain_and_ours(lambda ddp, optimizer: steps(ddp, optimizer, 20)))
    (plain_losses, plain), (our_losses, ours) = sides
    assert plain_losses == our_losses
    assert differing(plain, ours) == []


def test_a_frozen_prefix_does_not_move_and_its_backward_is_profiled():
    from kgt_ddp import FreezeAwareDDP
    from kgt_ddp.backward_profile import SKIPPED, STEPS, BackwardProfile

    def run():
        torch.manual_seed(3)
        ddp = FreezeAwareDDP(SmallResNet().cuda(), device_ids=[0], policy="static:blocks=3,step=6", interval=3)
        optimizer = OPTIMIZERS["sgd"](ddp.parameters())
        steps(ddp, optimizer, 1)
        profile = BackwardProfile(ddp.freezing.blocks)
        for step in range(STEPS + SKIPPED):
            steps(ddp, optimizer, 1, start=1 + step)
            profile.step_ended()
        steps(ddp, optimizer, 6, start=10)
        before = snapshot(ddp.module)
        steps(ddp, optimizer, 10, start=20)
        frozen = {n for b in ddp.freezing.blocks.blocks[:3] for n, _ in b.parameters}
        return ddp.freezing.frontier, frozen & set(differing(before, snapshot(ddp.module))), profile.block_seconds

    frontier, moved, seconds = with_nccl(run)
    assert frontier == 3
    assert moved == set()
    assert sum(seconds) > 0


def test_a_running_mean_stays_on_the_device_and_goes_through_a_checkpoint():
    from kgt_ddp.blocks import Blocks
    from kgt_ddp.weight_mean import WeightMean

    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        net = SmallResNet().to(device)
        blocks = Blocks(net)
        mean, later = (WeightMean(blocks, 0.5) for _ in range(2))
        for step in (10, 20):
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(1.5)
            mean.note(step, lambda: 0.1)
        state = mean.state_dict()
        assert {t.device.type for t in state["means"].values()} == {"cpu"}
        later.load_state_dict(state)
        blocks.move_to(2)
        later.moved_from(0)
        ends.append({name: t.detach() for name, t in blocks.tensors_at(2).items()})
        assert {t.device.type for t in ends[-1].values()} == {device}
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name].cpu(), expected)


@pytest.mark.parametrize("locked", [True, False], ids=["into locked pages", "by way of staging memory"])
def test_weights_arrive_in_shared_memory(locked, monkeypatch):
    if not locked:
        monkeypatch.setattr(page_locks, "_lock", lambda slot: None)
    model = SmallResNet().cuda()
    tensors = named_tensors(model)
    layout = Layout.of(tensors)
    slots = [layout.map(memory_file("kgtrun-test", layout.num_bytes)) for _ in range(2)]
    transfer = Transfer()
    for turn in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        slot = slots[turn % 2]
        transfer.start(tensors, slot)
        torch.cuda.synchronize()
        if not locked:
            assert not torch.equal(slot["head.weight"], model.head.weight.cpu()), "the host copies when it is asked"
        assert transfer.done()
        assert all(torch.equal(slot[name], tensor.detach().cpu()) for name, tensor in tensors.items())
    transfer.release()
    locks = PageLocks()
    assert [locks.lock(slot, torch.device("cuda")) for slot in slots] == [locked, locked], "they were unlocked"
    locks.release()


def test_the_next_kernel_is_not_blamed_for_pages_that_could_not_be_locked():
    layout = Layout.of({"weight": torch.zeros(1000)})
    slot = layout.map(memory_file("kgtrun-test", layout.num_bytes))
    locks, others = PageLocks(), PageLocks()
    assert locks.lock(slot, torch.device("cuda"))
    assert not others.lock(slot, torch.device("cuda")), "they are locked already"
    assert torch.ones(3, device="cuda").add(1).tolist() == [2.0, 2.0, 2.0]
    others.release()
    locks.release()
    assert others.lock(slot, torch.device("cuda"))
    others.release()


def test_slots_that_are_given_up_during_a_copy_stay():
    tensors = {"weight": torch.ones(64 << 20, device="cuda")}
    layout = Layout.of(tensors)
    slot = layout.map(memory_file("kgtrun-test", layout.num_bytes))
    transfer = Transfer()
    transfer.start(tensors, slot)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # about a second
    transfer.start(tensors, slot)
    given_up = len(transfer_module._given_up)
    transfer.release()
    assert len(transfer_module._given_up) == given_up + 1
    torch.cuda.synchronize()
    assert bool((slot["weight"] == 1).all())


def test_gradients_are_whole_where_backward_is_called_in_another_stream():
    def train(ddp, optimizer):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            losses = steps(ddp, optimizer, 10)
        torch.cuda.synchronize()
        return losses

    (plain_losses, plain), (losses, ours) = with_nccl(lambda: plain_and_ours(train))
    assert plain_losses == losses and differing(plain, ours) == []


def test_under_loss_scaling_freezing_off_equals_plain_ddp_and_a_frozen_prefix_stays():
    from kgt_ddp import FreezeAwareDDP

    def compare():
        sides = plain_and_ours(lambda ddp, optimizer: scaled_steps(ddp, optimizer, 20))
        torch.manual_seed(3)
        ddp = FreezeAwareDDP(SmallResNet().cuda(), device_ids=[0], policy="static:blocks=3,step=6", interval=3)
        optimizer = OPTIMIZERS["sgd"](ddp.parameters())
        scaled_steps(ddp, optimizer, 30)
        before = snapshot(ddp.module)
        losses, _ = scaled_steps(ddp, optimizer, 10)
        moved = set(differing(before, snapshot(ddp.module)))
        frozen = {n for b in ddp.freezing.blocks.blocks[:3] for n, _ in b.parameters}
        return sides, ddp.freezing.frontier, frozen, moved, losses

    sides, frontier, frozen, moved, losses = with_nccl(compare)
    ((plain_losses, scale), plain), ((our_losses, our_scale), ours) = sides
    assert plain_losses == our_losses and scale == our_scale < 2.0**24
    assert differing(plain, ours) == []
    assert frontier == 3 and moved and not frozen & moved
    assert all(torch.tensor(losses).isfinite())


def two_on_one_gpu(rank, world, policy, steps_before, steps_after):
    from torch.backends import cudnn  # not by way of torch: a module that cannot travel
    from torch.nn.parallel import DistributedDataParallel

    from kgt_ddp import FreezeAwareDDP

    cudnn.deterministic = True
    torch.manual_seed(3)
    net = SmallResNet().cuda()
    ddp = FreezeAwareDDP(net, policy=policy, interval=3) if policy else DistributedDataParallel(net)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    losses, taken = [], []
    for step in range(steps_before + steps_after):
        if step == steps_before:
            taken = snapshot(net)
        losses.append(descend(ddp, optimizer, *(t.cuda() for t in image_batch(step, rank))))
    after = {name: tensor.cpu() for name, tensor in snapshot(net).items()}
    before = {name: tensor.cpu() for name, tensor in taken.items()}
    if not policy:
        return losses, before, after, 0, set()
    frozen = {n for b in ddp.freezing.blocks.blocks[: ddp.freezing.frontier] for n, _ in b.parameters}
    ddp.freezing.close()
    return losses, before, after, ddp.freezing.frontier, frozen


def test_two_ranks_of_one_gpu_equal_plain_ddp_and_each_other_when_blocks_freeze_at_their_mean(run_ranks):
    plain = run_ranks(2, two_on_one_gpu, None, 10, 10)
    ours = run_ranks(2, two_on_one_gpu, "none", 10, 10)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine[0] == theirs[0] and differing(mine[2], theirs[2]) == []
    first, second = run_ranks(2, two_on_one_gpu, "static:blocks=3,step=9,weight_mean=0.1", 20, 20)
    assert first[3] == second[3] == 3
    weights = [
        {n: t for n, t in one[2].items() if "running" not in n and "num_batches" not in n} for one in (first, second)
    ]
    assert differing(*weights) == []
    moved = set(differing(first[1], first[2]))
    assert moved and not first[4] & moved


def heard_on_gpu(rank, world, count, device):
    from kgt_ddp import FreezeAwareDDP

    torch.manual_seed(3)
    ddp = FreezeAwareDDP(SmallResNet().to(device), policy="kgt", interval=3, total_steps=count)
    optimizer = OPTIMIZERS["sgd"](ddp.parameters())
    for step in range(count):
        descend(ddp, optimizer, *(t.to(device) for t in image_batch(step, 0)))
    stats = ddp.freezing.summary()["reference"]
    ddp.freezing.close()
    return stats


@pytest.fixture
def reference(tmp_path):
    made = Reference(tmp_path)
    made.start()
    yield made
    made.stop()


def test_the_reference_scores_weights_of_the_gpu_as_it_does_those_of_the_cpu(run_ranks, reference, tmp_path):
    """Repeatable runs, so that each scores the same steps. Trainings differ by the order of additions."""
    scores = {}
    for device in ("cpu", "cuda"):
        run_dir = tmp_path / device
        environ = {
            "KGTRUN_REFERENCE_DIR": str(reference.directory),
            "KGTRUN_NUM_REFERENCES": "1",
            "KGTRUN_DETERMINISTIC": "1",
            "KGTRUN_RUN_DIR": str(run_dir),
        }
        (stats,) = run_ranks(1, heard_on_gpu, 210, device, env=environ, timeout_s=150)
        assert stats["scores"] > 10 and stats["dropped"] == 0
        events = [e for e in read_events(run_dir) if e["kind"] == "score"]
        scores[device] = {(e["step"], e["lag_steps"]): e["values"] for e in events}
    assert scores["cpu"].keys() == scores["cuda"].keys()
    early = [key for key in scores["cpu"] if key[0] <= 24]
    assert early
    for key in early:
        assert scores["cuda"][key] == pytest.approx(scores["cpu"][key], rel=0.1, abs=1e-6)


def test_a_compiled_model_freezes_and_stays_frozen():
    from kgt_ddp import FreezeAwareDDP

    def run():
        torch.manual_seed(3)
        net = torch.compile(SmallResNet().cuda())
        ddp = FreezeAwareDDP(net, device_ids=[0], policy="static:blocks=3,step=6", interval=3)
        optimizer = OPTIMIZERS["sgd"](ddp.parameters())
        losses = steps(ddp, optimizer, 20)
        before = snapshot(ddp.module)
        losses += steps(ddp, optimizer, 10, start=20)
        frozen = {n for b in ddp.freezing.blocks.blocks[:3] for n, _ in b.parameters}
        return ddp.freezing.frontier, frozen, set(differing(before, snapshot(ddp.module))), losses

    frontier, frozen, moved, losses = with_nccl(run)
    assert frontier == 3 and moved and not frozen & moved
    assert all(torch.tensor(losses).isfinite())
