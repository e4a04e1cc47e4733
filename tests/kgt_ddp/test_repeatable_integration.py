"""Under --deterministic a job with `kgt`, a reference and a scheduler makes the same decisions at the same steps again,
whatever the machine is doing meanwhile."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kgt_ddp import FreezeAwareDDP
from kgtrun.contract.events import read_events
from tests.kgt_ddp.networks import SmallResNet
from tests.kgt_ddp.reference.conftest import Reference, short_directory
from tests.kgt_ddp.training import image_batch

pytestmark = pytest.mark.integration

STEPS = 300


def closed_loop(rank, world, steps, unrest_s):
    """Freezes of a job whose length only its scheduler knows; `unrest_s` is slept at random before some steps."""
    torch.manual_seed(3)
    patient = dist.new_group(timeout=timedelta(minutes=5))  # a busy machine may take long to the first score
    ddp = FreezeAwareDDP(SmallResNet(), process_group=patient, policy="kgt:tolerance=0.1", interval=3)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    unrest = random.Random(rank)
    for step in range(steps):
        if unrest_s and unrest.random() < 0.1:
            time.sleep(unrest_s)
        x, y = image_batch(step % 16, rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        scheduler.step()
    freezes = ddp.freezing.summary()["freezes"]
    weights = [p.detach().clone() for p in ddp.parameters()]
    ddp.freezing.close()
    return freezes, weights


def one_run(run_ranks, tmp_path, name, *, unrest_s, late_s):
    """Results, and what rank 0 recorded of its decisions. The reference can be reached after `late_s`."""
    run_dir = tmp_path / name
    with short_directory() as root:
        reference = Reference(root)
        reference.start()
        seen = root / "seen"
        seen.mkdir(mode=0o700)
        appearing = threading.Timer(late_s, (seen / reference.path.name).symlink_to, (reference.path,))
        appearing.start()
        environ = {
            "KGTRUN_REFERENCE_DIR": str(seen),
            "KGTRUN_NUM_REFERENCES": "1",
            "KGTRUN_DETERMINISTIC": "1",
            "KGTRUN_RUN_DIR": str(run_dir),
            "OMP_NUM_THREADS": "1",
        }
        try:
            results = run_ranks(2, closed_loop, STEPS, unrest_s, timeout_s=300, env=environ)
        finally:
            appearing.join()
            reference.stop()
    events = list(read_events(run_dir))
    assert [e["why"] for e in events if e["kind"] == "not_repeatable"] == []
    told = [(e["step"], e["frontier"], e["reason"], e["numbers"]) for e in events if e["kind"] == "decision"]
    lengths = sorted((e["index"], e["step"], e["total_steps"]) for e in events if e["kind"] == "job_length")
    return results, told, lengths


def test_decisions_and_weights_are_the_same_again(run_ranks, tmp_path):
    first = one_run(run_ranks, tmp_path, "first", unrest_s=0.0, late_s=0.0)
    again = one_run(run_ranks, tmp_path, "again", unrest_s=0.02, late_s=5.0)
    (results, told, lengths), (results_again, told_again, lengths_again) = first, again
    assert lengths == lengths_again
    assert [(rank, total) for rank, _, total in lengths] == [(0, STEPS), (1, STEPS)]
    freezes = results[0][0]
    assert freezes, "nothing froze: the test would show nothing"
    assert told == told_again
    for (one, weights), (other, weights_again) in zip(results, results_again, strict=True):
        assert one == freezes == other
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))
