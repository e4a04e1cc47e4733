"""What breaks, made to happen: the trainer's calls stay short and silent, the reference survives what it is sent."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from kgt_ddp.reference import protocol
from kgt_ddp.reference.arena import memory_file, payload_file
from kgt_ddp.reference.client import ReferenceClient
from kgt_ddp.reference.samples import Samples
from tests import shared_memory

pytestmark = pytest.mark.integration

CALL_S = 1.0
"""Longest that one call of a client may take: ample for a machine with other work, far below any wait."""


class Slow(nn.Module):
    """Keeps a score in flight long enough to break something meanwhile."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.inner(x)


def offered(reference, net, watched=("inner",)):
    client = ReferenceClient(reference.directory, 0)
    assert client.offer_model(net, list(watched), lags=(1,))
    client.retain_probe(Samples((torch.randn(6, 8),)))
    return client


def train_on(client, seconds, first_step, every_s=0.02):
    """What a trainer does meanwhile: submit and poll. Returns the next step and the longest call."""
    step, longest, end = first_step, 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        client.submit(step, 0)
        client.poll()
        longest = max(longest, time.monotonic() - started)
        step += 1
        time.sleep(every_s)
    return step, longest


def scores_again(client, step, tools):
    """Submit step by step until a score comes of it; the reference may still be starting."""
    end = time.monotonic() + 60
    while not (scores := client.poll(0.05)):
        assert time.monotonic() < end, client.problem
        if client.in_flight == 0:
            step += client.submit(step, 0)
    return scores


def test_killed_with_a_score_in_flight_then_started_again(reference, tools):
    process = reference.start()
    client = offered(reference, Slow(0.3))
    tools.until(lambda: client.submit(0, 0), 30)
    tools.until(lambda: client.poll() == [] and client.in_flight == 0, 30)
    assert client.submit(1, 0)
    time.sleep(0.1)
    process.kill()
    process.wait(10)
    process.stderr.close()
    step, longest = train_on(client, 1.5, 2)
    assert longest < CALL_S
    assert not client.connected and client.problem
    reference.start()
    assert scores_again(client, step, tools)
    assert client.stats.connections == 2 and client.problem is None
    client.close()


def stalled(reference, tools, seconds):
    process = reference.start()
    client = offered(reference, tools.small_net(), ["0"])
    tools.until(lambda: client.submit(0, 0), 30)
    os.kill(process.pid, signal.SIGSTOP)
    step, longest = train_on(client, seconds, 1)
    assert longest < CALL_S
    assert client.connected and client.stats.dropped > 10
    os.kill(process.pid, signal.SIGCONT)
    assert scores_again(client, step, tools)
    assert client.stats.connections == 1
    client.close()


def test_stopped_for_three_seconds(reference, tools):
    stalled(reference, tools, 3.0)


@pytest.mark.skipif("KGTRUN_SOAK" not in os.environ, reason="half a minute; KGTRUN_SOAK=1 runs it")
def test_stopped_for_thirty_seconds(reference, tools):
    stalled(reference, tools, 30.0)


def test_no_reference_at_all_costs_next_to_nothing(tmp_path, tools):
    client = ReferenceClient("/nonexistent", 0)
    client.offer_model(tools.small_net(), ["0"], lags=(1,))
    step, longest = train_on(client, 1.0, 0, every_s=0.0)
    assert longest < CALL_S
    assert client.stats.busy_s / step < 1e-3
    assert client.stats.dropped == step and "no reference" in client.problem
    client.close()


def test_a_reference_that_ends_at_start_says_why(reference):
    for environ, word in (
        ({"KGTRUN_REFERENCE_PRECISION": "int3"}, "int3"),
        ({"KGTRUN_REFERENCE_DIR": "/nonexistent"}, "No such file"),
        ({"KGTRUN_CPUS": "all"}, "KGTRUN_CPUS"),
    ):
        process = reference.start(wait=False, **environ)
        _, text = process.communicate(timeout=60)
        assert process.returncode == 2
        assert word in text.decode() and "Traceback" not in text.decode()


def test_a_directory_open_to_others_is_refused(reference):
    reference.directory.chmod(0o755)
    process = reference.start(wait=False)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 2 and b"0700" in text


def raw(reference) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(20)
    connection.connect(str(reference.path))
    return connection


def is_refused(connection) -> bool:
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionError:
        return True


def model_message(**changes):
    fields = {"version": protocol.VERSION, "generation": 0, "num_slots": 1}
    return json.dumps({"type": "model", **fields, **changes}).encode()


def test_a_thousand_random_messages_and_it_still_scores(shared_reference, tools):
    chance = random.Random(0)
    for _ in range(1000):
        connection = raw(shared_reference)
        with connection:
            connection.send(chance.randbytes(chance.randint(1, 4096)))
            assert is_refused(connection)
    assert shared_reference.events("reference_refused")[-1]["count"] >= 512
    assert len(shared_reference.events("reference_refused")) < 40
    client = offered(shared_reference, tools.small_net(), ["0"])
    assert scores_again(client, 0, tools)
    client.close()


def truncatable() -> int:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 4096)
    return fd


def pickled(value) -> int:
    return payload_file("test", lambda file: pickle.dump(value, file))


def envelope(**changes):
    entries = {"w": ("torch.float32", (2, 2), 0)}
    plain = {"structure": b"", "entries": entries, "num_bytes": 64, "watched": ["a"], "lags": [1], "pairing": "probe"}
    return {**plain, "surroundings": {"cwd": "/", "sys_path": []}, **changes}


class Bomb:
    def __reduce__(self):
        return sys.exit, (3,)


CORRUPT = {
    "empty object": (b"{}", []),
    "deep nesting": (b"[" * 60_000, []),
    "wrong version": (model_message(version=99), []),
    "without descriptors": (model_message(), []),
    "a submit before a model": (
        protocol.encode("submit", step=0, generation=0, slot=0, names=None, samples=False, similarities=False),
        [],
    ),
    "booleans for numbers": (model_message(num_slots=True), []),
    "numbers without end": (model_message(generation=10**30), []),
    "a payload that is no pickle": (
        model_message(),
        [lambda: payload_file("t", lambda f: f.write(b"\x80\x05garbage")), lambda: memory_file("t", 64)],
    ),
    "a payload that exits": (model_message(), [lambda: pickled(Bomb()), lambda: memory_file("t", 64)]),
    "an envelope of another kind": (model_message(), [lambda: pickled([1]), lambda: memory_file("t", 64)]),
    "a slot that can be truncated": (model_message(), [lambda: pickled(envelope()), truncatable]),
    "a slot that is a directory": (
        model_message(),
        [lambda: pickled(envelope()), lambda: os.open("/", os.O_RDONLY)],
    ),
    "a slot too small": (
        model_message(),
        [lambda: pickled(envelope(num_bytes=1 << 20)), lambda: memory_file("t", 64)],
    ),
    "a tensor outside of its slot": (
        model_message(),
        [
            lambda: pickled(envelope(entries={"w": ("torch.float32", (1 << 40,), 0)})),
            lambda: memory_file("t", 64),
        ],
    ),
    "negative shapes": (
        model_message(),
        [lambda: pickled(envelope(entries={"w": ("torch.float32", (-4, -4), 0)})), lambda: memory_file("t", 64)],
    ),
    "lags of another kind": (model_message(), [lambda: pickled(envelope(lags=["x"])), lambda: memory_file("t", 64)]),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_message_ends_its_connection_and_nothing_else(shared_reference, name):
    data, makers = CORRUPT[name]
    before = shared_reference.descriptors()
    fds = [make() for make in makers]
    with raw(shared_reference) as connection:
        assert protocol.send(connection, data, fds)
        protocol.close_all(fds)
        assert is_refused(connection)
    assert shared_reference.process.poll() is None
    deadline = time.monotonic() + 10
    while shared_reference.descriptors() > before:
        assert time.monotonic() < deadline, "the reference kept a descriptor"
        time.sleep(0.02)


def test_a_corrupt_submit_after_a_proper_model(shared_reference, tools):
    for changes in ({"slot": 7}, {"slot": None}, {"names": [[0, 99]]}, {"names": ["x"]}, {"lags": [-1]}):
        client = offered(shared_reference, tools.small_net(), ["0"])
        tools.exchange(client, 0)
        fields = {"step": 1, "generation": 0, "slot": 0, "names": None, "samples": False, "similarities": False}
        protocol.send(client._online.connection, protocol.encode("submit", **{**fields, **changes}))
        tools.until(lambda c=client: c.poll() == [] and not c.connected, 20)
        assert scores_again(client, 1, tools)  # and the trainer recovers by itself
        client.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_is_refused(reference):
    reference.start()
    # root ignores modes; the other user must get as far as the socket for the kernel's answer to matter
    for path, mode in ((reference.directory.parent, 0o755), (reference.directory, 0o711), (reference.path, 0o777)):
        path.chmod(mode)
    program = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(20); s.connect(sys.argv[1]);"
        "print(s.recv(10) == b'')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(reference.path)], capture_output=True, timeout=60, text=True
    )
    assert done.stdout.strip() == "True", done.stderr
    assert "user 65534" in reference.events("reference_refused")[-1]["reason"]
    reference.directory.chmod(0o700)


def answering_falsely(directory, answer: bytes) -> subprocess.Popen:
    """A process that takes the reference's place and answers every connection with `answer`."""
    program = (
        "import socket, sys, os; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.bind(sys.argv[1]); s.listen(8)\n"
        "while True:\n    c, _ = s.accept(); c.recv(65536); c.send(bytes.fromhex(sys.argv[2]))"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(directory / "ref0.sock"), answer.hex()])


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\x00 no json",
        b'{"type": "score", "step": 1}',
        protocol.encode("free", slot=0),
        protocol.encode("free", slot=9),
        protocol.encode(
            "score",
            step=1,
            generation=0,
            pairing="probe",
            precision="bf16",
            lag_steps=1,
            values=[1.0, 2.0, 3.0],
            floors=[],
            cost_s=0.0,
            cpu_s=0.0,
        ),
        protocol.encode("submit", step=0, generation=0, slot=0, names=None, samples=False, similarities=False),
    ],
)
def test_false_answers_never_reach_training(tools, answer):
    with tools.short_directory() as directory:
        process = answering_falsely(directory, answer)
        try:
            tools.until((directory / "ref0.sock").exists, 30)
            client = ReferenceClient(directory, 0)
            client.offer_model(tools.small_net(), ["0"], lags=(1,))
            client.retain_probe(Samples((torch.randn(6, 8),)))
            _, longest = train_on(client, 0.5, 0)
            assert longest < CALL_S
            assert client.stats.scores == 0
            client.close()
        finally:
            process.kill()
            process.wait(10)


def test_a_listener_that_never_reads_is_never_waited_for(tools):
    with tools.short_directory() as directory:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(directory / "ref0.sock"))
        listener.listen(0)
        clients = []
        for _ in range(4):  # beyond the backlog connect() itself says "try again"
            client = ReferenceClient(directory, 0)
            client.offer_model(tools.small_net(), ["0"], lags=(1,))
            _, longest = train_on(client, 0.2, 0)
            assert longest < CALL_S
            clients.append(client)
        for client in clients:
            client.close()
        listener.close()


def test_it_ends_with_its_parent_and_leaves_nothing(tools):
    with tools.short_directory() as root:
        one = tools.Reference(root)
        settings = {
            "KGTRUN_REFERENCE_DIR": str(one.directory),
            "KGTRUN_REFERENCE_INDEX": "0",
            "KGTRUN_RUN_DIR": str(one.run_dir),
        }
        program = (
            "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-m', 'kgt_ddp.reference.worker']);"
            "print(p.pid, flush=True); time.sleep(100)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True
        )
        pid = int(parent.stdout.readline())
        tools.until(one.path.exists, 60)
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
        tools.until(lambda: not alive(pid), 20)
        assert list(one.directory.iterdir()) == []
        assert "parent" in one.events("reference_stop")[-1]["reason"]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_it_ends_when_its_socket_is_removed(reference):
    process = reference.start()
    reference.path.unlink()
    assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_on_signals_also_while_it_scores(reference, tools, number):
    process = reference.start()
    client = offered(reference, Slow(30.0))
    tools.until(lambda: client.submit(0, 0), 30)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(30) == 0
    assert list(reference.directory.iterdir()) == []
    assert reference.events("reference_stop")[-1]["reason"] == number.name
    client.close()


def test_a_parents_thread_may_end_without_ending_it(reference, tools):
    import threading

    thread = threading.Thread(target=lambda: reference.start(wait=False))
    thread.start()
    thread.join()
    tools.until(reference.path.exists, 60)
    client = offered(reference, tools.small_net(), ["0"])
    assert scores_again(client, 0, tools)
    client.close()


def test_memory_of_both_sides_is_flat_over_200_snapshots(shared_reference, tools):
    net = nn.Sequential(nn.Linear(8, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 4))
    client = ReferenceClient(shared_reference.directory, 0)
    client.offer_model(net, ["0", "1"], lags=(1, 2, 4), pairing="fresh")
    for step in range(60):
        tools.exchange(client, step, samples=Samples((torch.randn(32, 8),)))
    fds = len(os.listdir("/proc/self/fd")), shared_reference.descriptors()
    before = tools.resident_bytes(os.getpid()), shared_reference.memory_bytes()
    for step in range(60, 260):
        tools.exchange(client, step, samples=Samples((torch.randn(32, 8),)))
    after = tools.resident_bytes(os.getpid()), shared_reference.memory_bytes()
    assert client.stats.scores > 500
    assert (len(os.listdir("/proc/self/fd")), shared_reference.descriptors()) == fds
    snapshot_bytes = sum(p.nbytes for p in net.parameters())
    for one, two in zip(before, after, strict=True):
        assert two - one < 4 * snapshot_bytes, "200 snapshots of 4 MB left more than four of them behind"
    client.close()


def test_the_client_leaves_nothing_behind(shared_reference, tools):
    gc.collect()  # what other tests left for the collector is not ours to count
    fds = set(os.listdir("/proc/self/fd"))
    server = shared_reference.descriptors()
    for _ in range(5):
        client = offered(shared_reference, tools.small_net(), ["0"])
        tools.exchange(client, 0)
        client.close()
        client.close()
        del client
    assert set(os.listdir("/proc/self/fd")) <= fds
    tools.until(lambda: shared_reference.descriptors() <= server, 30)


TRAINER = """
import sys, time, torch
from torch import nn
from kgt_ddp.reference.client import ReferenceClient
from kgt_ddp.reference.samples import Samples

net = nn.Sequential(nn.Linear(8, 500), nn.Linear(500, 500))
client = ReferenceClient(sys.argv[1], 0)
client.offer_model(net, ["0", "1"], lags=(1,))
client.retain_probe(Samples((torch.randn(6, 8),)))
end, step = time.monotonic() + 60, 0
while time.monotonic() < end:
    step += client.submit(step, 0)
    if client.poll(0.01):
        print("scored", flush=True)
"""


def test_trainers_killed_in_the_middle_leave_nothing_in_the_reference(shared_reference, tools):
    names = shared_memory.names()
    before = shared_reference.descriptors()
    other = offered(shared_reference, tools.small_net(), ["0"])
    command = [sys.executable, "-c", TRAINER, str(shared_reference.directory)]
    for trainer in [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]:
        assert trainer.stdout.readline() == b"scored\n"
        trainer.kill()
        trainer.wait(10)
        trainer.stdout.close()
    assert scores_again(other, 0, tools)
    other.close()
    tools.until(lambda: shared_reference.descriptors() == before, 20)
    assert shared_memory.left_since(names) == []
