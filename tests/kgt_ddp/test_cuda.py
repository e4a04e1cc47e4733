"""The CUDA paths on one GPU with NCCL: parity with plain DDP, frozen bits, the profile's events, the copy to the reference.

Skipped without a CUDA device. Not run yet on any GPU (docs/freezing.md says so until they were).
"""

from __future__ import annotations

import pytest
import torch

from kgt_ddp.reference.arena import Layout, memory_file, named_tensors
from kgt_ddp.reference.transfer import Transfer
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.training import OPTIMIZERS, differing, image_batch, snapshot

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


def test_freezing_off_equals_plain_ddp_bit_for_bit():
    from torch.nn.parallel import DistributedDataParallel

    from kgt_ddp import FreezeAwareDDP

    def compare():
        sides = []
        for wrap in (DistributedDataParallel, lambda m, **kw: FreezeAwareDDP(m, policy="none", interval=3, **kw)):
            torch.manual_seed(3)
            ddp = wrap(SmallResNet().cuda(), device_ids=[0])
            losses = steps(ddp, OPTIMIZERS["sgd"](ddp.parameters()), 20)
            sides.append((losses, snapshot(ddp)))
        return sides

    (plain_losses, plain), (our_losses, ours) = with_nccl(compare)
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


def test_weights_arrive_in_shared_memory():
    model = SmallResNet().cuda()
    tensors = named_tensors(model)
    layout = Layout.of(tensors)
    slot = layout.map(memory_file("kgtrun-test", layout.num_bytes))
    transfer = Transfer()
    transfer.start(tensors, slot)
    torch.cuda.synchronize()
    assert transfer.done()
    assert all(torch.equal(slot[name], tensor.detach().cpu()) for name, tensor in tensors.items())
