"""A real reference process and a real client: what is scored, and that it is right."""

from __future__ import annotations

import copy
import fcntl
import os
import resource
import socket
import time

import pytest
import torch
from torch import nn

from kgt_ddp.plasticity import plasticity
from kgt_ddp.reference.client import ReferenceClient
from kgt_ddp.reference.samples import Samples, sub_batch
from kgt_ddp.reference.tap import ActivationTap

pytestmark = pytest.mark.integration


def nudge(net: nn.Module, scale: float = 0.05) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))


def activations(net: nn.Sequential, x: torch.Tensor, blocks: list[str]) -> dict[str, torch.Tensor]:
    found = {}
    with torch.no_grad():
        for name, layer in net.eval().named_children():
            x = layer(x)
            if name in blocks:
                found[name] = x
    return found


@pytest.fixture
def client(shared_reference):
    one = ReferenceClient(shared_reference.directory, 0)
    yield one
    one.close()


def test_probe_scores_are_the_plasticity_between_snapshots_at_exact_distances(client, tools):
    net, blocks, x = tools.small_net(), ["0", "2"], torch.randn(6, 8)
    assert client.offer_model(net, blocks, lags=(10, 20))
    client.retain_probe(sub_batch((x,), {}, 64))
    past = {}
    for step in (10, 20, 30, 35):
        nudge(net)
        past[step] = copy.deepcopy(net)
        scores = tools.exchange(client, step)
        expected_lags = [lag for lag in (10, 20) if step - lag in past]
        assert [s.lag_steps for s in scores] == expected_lags
        for score in scores:
            assert (score.step, score.generation, score.pairing, score.precision) == (step, 0, "probe", "fp32")
            old, new = activations(past[step - score.lag_steps], x, blocks), activations(net, x, blocks)
            for block in blocks:
                assert score.values[block] == pytest.approx(plasticity(old[block], new[block]), rel=1e-4)
            assert score.floors == {"0": 0.0, "2": 0.0}
            assert score.cost_s > 0 and score.cpu_s > 0


def test_fresh_samples_run_both_snapshots_again(client, tools):
    net, blocks = tools.small_net(), ["0", "2"]
    client.offer_model(net, blocks, lags=(5,), pairing="fresh")
    past = {}
    for step in (0, 5, 10):
        nudge(net)
        past[step] = copy.deepcopy(net)
        x = torch.randn(6, 8)
        scores = tools.exchange(client, step, samples=Samples((x,)))
    old, new = activations(past[5], x, blocks), activations(net, x, blocks)
    assert scores[0].values["2"] == pytest.approx(plasticity(old["2"], new["2"]), rel=1e-4)


@pytest.mark.parametrize("pairing", ["live", "eval"])
def test_the_trainers_activations_against_an_older_snapshot(client, tools, pairing):
    net, blocks = tools.small_net(), ["0", "2"]
    net.insert(3, nn.Dropout(0.5))
    tap = ActivationTap(net, blocks, limit=6)
    client.offer_model(net, blocks, lags=(5,), pairing=pairing)
    past = {}
    for step in (0, 5):
        nudge(net)
        net.train()
        past[step] = copy.deepcopy(net)
        x = torch.randn(9, 8)
        samples = sub_batch((x,), {}, 6)
        if pairing == "live":
            with tap.recording():
                net(x)
            similarities = tap.take()
        else:
            similarities = tap.evaluate(samples)
            assert net.training and net[3].training
        scores = tools.exchange(client, step, samples=samples, similarities=similarities)
    old, new = activations(past[0], x[:6], blocks), activations(net, x[:6], blocks)
    assert scores[0].values["2"] == pytest.approx(plasticity(old["2"], new["2"]), rel=1e-4)
    assert not any(m._forward_hooks for m in net.modules())


def test_blocks_that_do_not_change_are_left_out_once_they_have_arrived(client, tools):
    net = tools.small_net()
    client.offer_model(net, ["0", "2"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    sizes = []
    for step in range(4):
        before = client.stats.bytes_copied
        nudge(net[2])
        scores = tools.exchange(client, step, unchanged=["0"] if step else [])
        sizes.append(client.stats.bytes_copied - before)
    all_bytes = sum(p.nbytes for p in net.parameters())
    assert sizes == [all_bytes, all_bytes, all_bytes - sum(p.nbytes for p in net[0].parameters()), sizes[2]]
    assert scores[0].values["0"] == 0.0 and scores[0].values["2"] > 0


def test_a_frozen_block_that_is_written_to_is_sent_again(client, tools):
    """Its score says so: that is how a policy learns of it."""
    net = tools.small_net()
    client.offer_model(net, ["0", "2"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    for step in range(3):
        scores = tools.exchange(client, step, unchanged=["0"] if step else [])
    assert scores[0].values["0"] == 0.0
    nudge(net[0])
    scores = tools.exchange(client, 3, unchanged=["0"])
    assert scores[0].values["0"] > 0.0 and scores[0].values["2"] > 0.0
    assert tools.exchange(client, 4, unchanged=["0"])[0].values["0"] == 0.0


def test_scores_of_an_older_generation_are_not_returned(client, tools):
    net = tools.small_net()
    client.offer_model(net, ["0"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 1, generation=3)
    nudge(net)
    assert client.submit(2, 3)
    client._generation = 4  # the mask changed while the score was on its way
    end = time.monotonic() + 20
    while client.in_flight and time.monotonic() < end:
        assert client.poll(0.2) == []
    assert client.stats.stale == 1


def test_a_submit_of_an_older_generation_is_answered_without_a_score(client, tools, shared_reference):
    net = tools.small_net()
    client.offer_model(net, ["0"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 1, generation=7)
    assert tools.exchange(client, 2, generation=6) == []
    assert shared_reference.events("reference_stale")[-1]["generation"] == 6
    assert [s.lag_steps for s in tools.exchange(client, 2, generation=7)] == [1]


def test_of_several_submits_that_wait_the_latest_is_scored(client, tools, shared_reference):
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            time.sleep(1.5)
            return self.inner(x)

    net = Slow()
    client.offer_model(net, ["inner"], lags=(1, 2, 3))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 0)
    accepted, started = [], time.monotonic()
    for step in (1, 2, 3, 4, 5):
        nudge(net)
        accepted.append(client.submit(step, 0))
        if step == 1:
            time.sleep(0.5)  # its work has begun, its slot is free again
            client.poll()
    assert time.monotonic() - started < 1.4, "a submit waited for the reference"
    assert accepted == [True, True, True, False, False]
    assert client.stats.dropped == 2
    scores = []
    end = time.monotonic() + 20
    while client.in_flight and time.monotonic() < end:
        scores += client.poll(0.2)
    assert [(s.step, s.lag_steps) for s in scores] == [(1, 1), (3, 2), (3, 3)]
    assert client.stats.superseded == 1


def test_nan_activations_are_dont_know(client, tools):
    net = tools.small_net()
    client.offer_model(net, ["0", "2"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 0)
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    assert tools.exchange(client, 1)[0].values == {"0": 0.0, "2": None}


def test_several_trainers_share_one_reference(shared_reference, tools):
    nets = [tools.small_net() for _ in range(3)]
    clients = [ReferenceClient(shared_reference.directory, 0) for _ in nets]
    for client, net in zip(clients, nets, strict=True):
        client.offer_model(net, ["0"], lags=(1,))
        client.retain_probe(Samples((torch.randn(6, 8),)))
        tools.exchange(client, 0)
    nudge(nets[1])
    values = [tools.exchange(client, 1)[0].values["0"] for client in clients]
    assert values[0] == values[2] == 0.0 < values[1]
    for client in clients:
        client.close()


def test_a_model_that_fails_is_reported_and_the_next_one_is_scored(client, tools, shared_reference):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            raise KeyError("no such thing")

    client.offer_model(Broken(), ["inner"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    assert tools.exchange(client, 0) == []
    assert "no such thing" in client.problem
    assert "no such thing" in shared_reference.events("reference_error")[-1]["text"]
    client.offer_model(tools.small_net(), ["0", "9"], lags=(1,))
    assert tools.exchange(client, 0) == [] and "'9'" in client.problem
    client.offer_model(tools.small_net(), ["0"], lags=(1,))
    tools.exchange(client, 0)
    assert tools.exchange(client, 1)


def test_a_model_that_cannot_be_pickled_is_said_and_never_raised(client, tools):
    net = tools.small_net()
    net.lock = __import__("threading").Lock()
    assert not client.offer_model(net, ["0"], lags=(1,))
    assert "lock" in client.problem
    assert not client.submit(1, 0) and client.poll() == []


def test_a_model_that_changed_shape_is_not_submitted(client, tools):
    net = tools.small_net()
    client.offer_model(net, ["0"], lags=(1,))
    tools.until(lambda: client.submit(0, 0, samples=Samples((torch.randn(6, 8),))), 20)
    net[2] = nn.Linear(16, 17)
    assert not client.submit(1, 0)
    assert "shape" in client.problem


def test_a_forked_child_leaves_the_connection_alone(client, tools):
    net = tools.small_net()
    client.offer_model(net, ["0"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 0)
    child = os.fork()
    if child == 0:
        os._exit(0 if not client.submit(1, 0) and client.poll() == [] and client.in_flight == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [s.step for s in tools.exchange(client, 1)] == [1]


def test_an_address_too_long_is_said_at_once():
    with pytest.raises(ValueError, match="107 bytes"):
        ReferenceClient("/tmp/" + "x" * 120, 0)


def test_without_references_there_is_no_client(tmp_path):
    assert ReferenceClient.from_environment(0, {}) is None
    assert ReferenceClient.from_environment(0, {"KGTRUN_REFERENCE_DIR": "/x", "KGTRUN_NUM_REFERENCES": "0"}) is None
    client = ReferenceClient.from_environment(5, {"KGTRUN_REFERENCE_DIR": "/x", "KGTRUN_NUM_REFERENCES": "2"})
    assert client is not None and client._path.name == "ref1.sock"


class Unreadable:
    """Cannot be unpickled anywhere."""

    def __reduce__(self):
        return int, ("not a number",)


def test_samples_that_do_not_load_there_are_said_once_and_the_connection_stays(client, tools, caplog):
    client.offer_model(tools.small_net(), ["0"], lags=(1,))
    client.retain_probe(Samples((Unreadable(),)))
    for step in range(3):
        assert tools.exchange(client, step) == []
    assert client.stats.connections == 1 and "cannot be unpickled" in client.problem
    assert caplog.text.count("the reference cannot score: no scores: samples that cannot be unpickled") == 1


def test_a_probe_that_cannot_be_pickled_is_said_and_nothing_more_is_sent(client, tools, caplog):
    client.offer_model(tools.small_net(), ["0"], lags=(1,))
    client.retain_probe(Samples((__import__("threading").Lock(),)))
    assert [client.submit(step, 0) for step in range(3)] == [False] * 3
    assert caplog.text.count("its samples cannot be pickled") == 1 and not client.connected


def test_a_want_of_descriptors_passes(client, tools, monkeypatch):
    client.offer_model(tools.small_net(), ["0"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.until(lambda: client.poll() == [] and client.connected, 60)
    with monkeypatch.context() as poor:
        poor.setattr("kgt_ddp.reference.client.payload_file", lambda *_: os.open("/nowhere", os.O_RDONLY))
        assert not client.submit(0, 0)
    assert client.offered
    tools.exchange(client, 1)
    assert client.stats.submitted == 1


def test_a_submit_whose_copy_ends_later_is_announced_by_the_next_step(client, tools, monkeypatch):
    """As on a device, where training is ahead of it."""
    ended = []
    monkeypatch.setattr(client._transfer, "done", lambda: bool(ended))
    client.offer_model(tools.small_net(), ["0"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.until(lambda: client.submit(0, 0), 60)
    client.announce()
    assert client.in_flight == 0
    ended.append(True)
    client.announce()
    assert client.in_flight == 1


def test_a_descriptor_beyond_those_that_select_takes_is_waited_for(client, tools):
    client.offer_model(tools.small_net(), ["0"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        tools.exchange(client, 0)
        high = fcntl.fcntl(client._online.connection, fcntl.F_DUPFD, 1500)
        client._online.connection.close()
        client._online.connection = socket.socket(fileno=high)
        assert len(tools.exchange(client, 1)) == 1
        client.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_samples_that_cannot_be_pickled_are_dropped_without_a_trace(client, tools):
    net = tools.small_net()
    client.offer_model(net, ["0"], lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    tools.exchange(client, 0)
    fds = set(os.listdir("/proc/self/fd"))
    bad = Samples((__import__("threading").Lock(),))
    assert not client.submit(1, 0, samples=bad)
    assert "pickle" in client.problem
    assert len(os.listdir("/proc/self/fd")) <= len(fds)
    tools.exchange(client, 1)
    assert [s.lag_steps for s in tools.exchange(client, 2)] == [1]
