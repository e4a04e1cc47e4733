"""Protocol, shared memory, samples, the model's way, and the process's own settings, each by itself."""

from __future__ import annotations

import collections
import os
import random
import socket
import threading

import pytest
import torch
from torch import nn

from kgt_ddp import torch_private
from kgt_ddp.reference import protocol
from kgt_ddp.reference.arena import Layout, memory_file, named_tensors, payload_file, read_payload, sealed_size
from kgt_ddp.reference.model import is_ours, model_from, pickled_structure, submodules
from kgt_ddp.reference.pairing import Comparison, FreshSamples, RetainedProbe, Scorer, TrainerActivations, Work
from kgt_ddp.reference.process import Settings, parse_cpus, precision_of
from kgt_ddp.reference.protocol import ProtocolError
from kgt_ddp.reference.samples import Samples, masks_in, num_samples, sub_batch
from kgt_ddp.reference.tap import ActivationTap
from kgt_ddp.reference.transfer import Transfer
from kgtrun.contract import environment


@pytest.fixture
def pair():
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, two:
        yield one, two


def test_a_message_and_its_descriptors_arrive_whole(pair):
    fd = payload_file("t", lambda file: file.write(b"hello"))
    assert protocol.send(pair[0], protocol.encode("free", slot=1), [fd])
    os.close(fd)
    data, fds = protocol.receive(pair[1])
    assert protocol.decode(data) == {"type": "free", "slot": 1}
    assert read_payload(fds[0]) == b"hello"
    assert not os.get_inheritable(fds[0])
    protocol.close_all(fds)
    assert protocol.receive(pair[1]) is None
    pair[0].close()
    with pytest.raises(EOFError):
        protocol.receive(pair[1])


def test_a_full_socket_and_a_closed_one_are_told_apart(pair):
    message = protocol.encode("error", text="x" * 2000)
    count = 0
    while protocol.send(pair[0], message):
        count += 1
        assert count < 10_000
    assert count > 1
    pair[1].close()
    with pytest.raises(OSError):
        protocol.send(pair[0], message)


def test_a_packet_too_long_is_refused(pair):
    pair[0].send(b"x" * (protocol.MAX_HEADER_BYTES + 1))
    with pytest.raises(ProtocolError):
        protocol.receive(pair[1])
    with pytest.raises(ProtocolError, match="exceeds"):
        protocol.encode("error", text="x" * protocol.MAX_HEADER_BYTES)


def test_decoding_raises_nothing_but_protocol_errors():
    chance = random.Random(0)
    proper = protocol.encode("done", step=1, generation=2)
    for _ in range(2000):
        data = bytearray(proper)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            protocol.decode(bytes(data))
        except ProtocolError:
            pass
        with pytest.raises(ProtocolError):
            protocol.decode(chance.randbytes(chance.randint(0, 200)))


def test_a_layout_keeps_every_type_and_shape():
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(7),
        "c": torch.randn(4).bfloat16(),
        "d": torch.tensor([True, False]),
        "e": torch.empty(0, 3),
    }
    layout = Layout.of(tensors)
    assert layout.fits(tensors) and not layout.fits({**tensors, "a": torch.randn(5, 3)})
    fd = memory_file("t", layout.num_bytes)
    written, read = layout.map(fd), layout.map(fd)
    os.close(fd)
    Transfer().start(tensors, written)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_what_cannot_travel_is_said_with_its_name():
    with pytest.raises(ValueError, match="spec is torch.complex64"):
        Layout.of({"spec": torch.zeros(2, dtype=torch.complex64)})


def test_memory_that_may_be_truncated_is_not_mapped():
    layout = Layout.of({"a": torch.zeros(4)})
    fd = os.memfd_create("t")
    os.ftruncate(fd, layout.num_bytes)
    with pytest.raises(ProtocolError, match="truncate"):
        layout.map(fd)
    os.close(fd)
    sealed = memory_file("t", layout.num_bytes)
    with pytest.raises(PermissionError):
        os.ftruncate(sealed, 0)
    os.close(sealed)


def test_anonymous_memory_without_pythons_own_call(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    fd = memory_file("t", 100)
    assert sealed_size(fd) == 100 and not os.get_inheritable(fd)
    os.close(fd)


Point = collections.namedtuple("Point", "x mask")


def test_the_first_samples_of_any_structure():
    x, ids = torch.arange(8.0).reshape(4, 2), torch.arange(4)
    cut = sub_batch((x, [ids, "text"], Point(x, None)), {"inputs": {"ids": ids}, "scale": torch.tensor(2.0)}, 3)
    assert torch.equal(cut.args[0], x[:3]) and torch.equal(cut.args[1][0], ids[:3]) and cut.args[1][1] == "text"
    assert isinstance(cut.args[2], Point) and cut.args[2].x.shape == (3, 2)
    assert torch.equal(cut.kwargs["inputs"]["ids"], ids[:3]) and cut.kwargs["scale"] == 2.0
    x.zero_()
    assert cut.args[0][2, 1] == 5.0


def test_a_batch_size_that_cannot_be_told_keeps_the_whole_call():
    src, causal = torch.zeros(5, 3, 2), torch.zeros(4, 4)
    assert num_samples((src,), {"mask": causal}) is None
    assert sub_batch((src,), {"mask": causal}, 2).args[0].shape == (5, 3, 2)
    assert num_samples((torch.zeros(5, 2),), {"position_ids": torch.zeros(1, 9)}) == 5


def test_masks_are_found_by_name_and_padding_masks_turned_around():
    keep, padding = torch.tensor([[1, 1, 0]]), torch.tensor([[False, True]])
    found = masks_in(
        Samples(({"attention_mask": keep},), {"tgt_key_padding_mask": padding, "causal_mask": torch.zeros(1, 3, 3)})
    )
    assert found["attention_mask"].tolist() == [[True, True, False]]
    assert found["tgt_key_padding_mask"].tolist() == [[True, False]]
    assert set(found) == {"attention_mask", "tgt_key_padding_mask"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.out = nn.Linear(64, 1000, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("nothing", None)
        self.constant = torch.tensor([1.0, 2.0])
        self.calls = 0

    def forward(self, x):
        return self.out(self.embed(x))


def test_the_structure_travels_without_weights_and_keeps_ties():
    net = Tied()
    net.out.weight.requires_grad_(False)
    structure = pickled_structure(net)
    assert len(structure) < 10_000 < net.embed.weight.nbytes
    copy = model_from(structure)
    assert copy.out.weight is copy.embed.weight and not copy.out.weight.requires_grad
    assert isinstance(copy.out.weight, nn.Parameter)
    assert torch.equal(copy.constant, net.constant) and copy.nothing is None
    assert Layout.of(named_tensors(net)).fits(named_tensors(copy))
    assert net.out.weight is net.embed.weight and net.embed.weight.shape == (1000, 64)


def test_our_hooks_and_methods_stay_behind_and_the_users_travel():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tap = ActivationTap(net, ["0"], limit=4)
    net[1].register_forward_hook(lambda _m, _a, out: out + 1)
    net[1].train = tap.take  # as a frozen block's method may be replaced
    with tap.recording():
        copy = model_from(pickled_structure(net))
    assert not copy[0]._forward_hooks and len(copy[1]._forward_hooks) == 1
    assert "train" not in vars(copy[1])
    assert is_ours(tap.take) and not is_ours(print) and not is_ours(net)


def test_hooks_that_cannot_be_pickled_are_left_behind_with_the_rest():
    net = nn.Linear(2, 2)
    lock = threading.Lock()
    net.register_forward_hook(lambda *_: lock.locked() and None)
    assert not model_from(pickled_structure(net))._forward_hooks
    net.lock = lock
    with pytest.raises(ValueError, match="Linear cannot be sent"):
        pickled_structure(net)


def test_a_compiled_submodule_and_a_non_leaf_attribute_travel():
    net = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    net.last = net[0](torch.ones(1, 2))
    copy = model_from(pickled_structure(net))
    assert torch.equal(copy.last, net.last) and copy.last.grad_fn is None


def test_a_name_that_the_model_lacks_is_said():
    with pytest.raises(ValueError, match="'nine'"):
        submodules(nn.Linear(2, 2), ["nine"])


class Counting:
    """A runner that answers with its weight and counts its forwards."""

    precision = "fp32"

    def __init__(self):
        self.weight = torch.zeros(2, 2)
        self.forwards = 0

    def load(self, weights):
        self.weight = weights["w"].clone()

    def similarities(self, samples):
        self.forwards += 1
        return {"b": self.weight + samples.args[0]}


def work(step, value, samples=None, similarities=None, lags=(2, 4)):
    return Work(
        step=step,
        lags=lags,
        weights={"w": torch.full((2, 2), float(value))},
        samples=samples,
        similarities=similarities,
    )


def test_the_probe_needs_one_forward_whatever_the_number_of_distances():
    runner = Counting()
    pairing = RetainedProbe(runner, ["b"])
    taken = []
    with pytest.raises(ValueError, match="no probe"):
        pairing.consider(work(0, 0), lambda: None)
    pairing.consider(work(0, 0, Samples((torch.zeros(2, 2),))), lambda: taken.append(0))
    assert pairing.consider(work(2, 1), lambda: taken.append(2)) == [Comparison(2, [1.0])]
    assert pairing.consider(work(4, 3), lambda: taken.append(4)) == [Comparison(2, [4.0]), Comparison(4, [9.0])]
    assert pairing.consider(work(5, 9), lambda: taken.append(5)) == []
    assert runner.forwards == 4 and taken == [0, 2, 4, 5]
    assert pairing.consider(work(6, 3, Samples((torch.ones(2, 2),))), lambda: None) == []
    assert pairing.consider(work(8, 3), lambda: None) == [Comparison(2, [0.0])]


def test_fresh_samples_and_the_trainers_activations_run_the_older_weights():
    samples = Samples((torch.zeros(2, 2),))
    fresh, live = FreshSamples(Counting(), ["b"]), TrainerActivations(Counting(), ["b"])
    for pairing, similarities in ((fresh, None), (live, {"b": torch.full((2, 2), 7.0)})):
        assert pairing.consider(work(0, 1, samples, similarities), lambda: None) == []
        with pytest.raises(ValueError, match="with every submit"):
            pairing.consider(work(1, 1), lambda: None)
    assert fresh.consider(work(2, 4, samples), lambda: None) == [Comparison(2, [9.0])]
    assert live.consider(work(2, 4, samples, {"b": torch.full((2, 2), 7.0)}), lambda: None) == [Comparison(2, [36.0])]


def test_memory_of_snapshots_is_bounded():
    samples = Samples((torch.zeros(2, 2),))
    probe, fresh = RetainedProbe(Counting(), ["b"]), FreshSamples(Counting(), ["b"])
    for step in range(200):
        probe.consider(work(step, 0, samples if step == 0 else None), lambda: None)
        fresh.consider(work(step, 0, samples), lambda: None)
    assert len(probe._remembered) == 64 and len(fresh._remembered) == 6


def test_the_floor_is_measured_now_and_then_against_fp32():
    runner, exact = Counting(), Counting()
    scorer = Scorer("probe", runner, exact, ["b"])
    scorer.score(work(0, 0, Samples((torch.zeros(2, 2),))), lambda: None)
    assert scorer.floors == [None] and exact.forwards == 0
    for step in range(2, 2 * 18, 2):
        scorer.score(work(step, step), lambda: None)
    assert scorer.floors == [0.0] and exact.forwards == 3
    with pytest.raises(ValueError, match="probe, fresh, live, eval"):
        Scorer("nearest", runner, exact, ["b"])


def test_lists_of_cores():
    assert parse_cpus("") == set()
    assert parse_cpus("0-2,8") == {0, 1, 2, 8}
    with pytest.raises(ValueError, match="KGTRUN_CPUS"):
        parse_cpus("0-")


@pytest.mark.parametrize(("asked", "fast", "found"), [("", True, "bf16"), ("", False, "fp32"), ("bf16", False, "bf16")])
def test_the_precision_is_the_fast_one_of_this_cpu_unless_one_is_asked_for(monkeypatch, asked, fast, found):
    monkeypatch.setattr(torch_private, "cpu_has_fast_bf16", lambda: fast)
    environ = {environment.REFERENCE_DIR: "d", environment.REFERENCE_PRECISION: asked}
    assert precision_of(Settings.read(environ)) == found
