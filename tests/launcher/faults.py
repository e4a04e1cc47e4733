"""One fault, injected at a random moment, and what must come of it. Used by CI (a few seeds) and `scripts/soak` (many).

A case starts two ranks that are connected to each other (the death of one is an error in the other, as with gloo), a
data-loader worker in each and one side-car, through the launcher itself. It then sends KILL, STOP or TERM to one of
them and checks the exit code, the message, the time it took, and that no process, socket or file is left.

`run_light`: the trainer imports no torch, so that a case takes a few seconds. `run_real`: the same on a small real job,
started by `kgtrun`: gloo, FreezeAwareDDP, a DataLoader with a worker, policy kgt and its reference process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kgtrun.contract.events import read_events
from launcher import process_tree

GRACE_S = 3.0
NUM_REAL_STEPS = 120  # six seconds or more, of which faults come in the first two
TARGETS = ("launcher", "rank 0", "rank 1", "reference", "loader")
ACTIONS = ("KILL", "STOP", "TERM")

LIGHT_TRAINER = """
import os, pathlib, signal, socket, subprocess, sys, time
from kgtrun.contract import heartbeat
here, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
loader = subprocess.Popen([sys.executable, "-S", "-c", "import time\\nwhile True: print(1, flush=True); time.sleep(0.05)"],
                          stdout=subprocess.PIPE)
(here / f"loader{rank}.part").write_text(str(loader.pid)); (here / f"loader{rank}.part").rename(here / f"loader{rank}")
path = str(here / f"peer{attempt}")
if rank == 0:
    server = socket.socket(socket.AF_UNIX); server.bind(path); server.listen(); peer, _ = server.accept()
else:
    peer = socket.socket(socket.AF_UNIX)
    while True:
        try: peer.connect(path); break
        except OSError: time.sleep(0.02)
(here / f"rank{rank}.part").write_text(str(os.getpid())); (here / f"rank{rank}.part").rename(here / f"rank{rank}")
for step in range(int(sys.argv[2])):
    if not loader.stdout.readline():
        raise RuntimeError("DataLoader worker exited unexpectedly")
    peer.sendall(b"x")
    if not peer.recv(1):
        raise ConnectionError("Connection closed by peer")
    heartbeat.beat(step)
loader.kill(); loader.wait()
"""

SIDECAR = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
(here / "reference.part").write_text(str(os.getpid())); (here / "reference.part").rename(here / "reference")
time.sleep(1000)
"""

DRIVER = """
import logging, pathlib, sys
from launcher.config import LaunchConfig, LogSpec, RankSpec, RendezvousSpec, SidecarSpec
from launcher.supervisor import launch
from kgtrun.plan import BOOT
here, restarts = pathlib.Path(sys.argv[1]), int(sys.argv[2])
logging.basicConfig()
out = launch(LaunchConfig(
    ranks=RankSpec(command=(sys.executable, "-u", BOOT, "script", str(here / "trainer.py"), str(here), "60"), count="2"),
    rendezvous=RendezvousSpec(run_id="fault"),
    logs=LogSpec(directory=here / "run/logs"),
    sidecars=SidecarSpec(command=(sys.executable, "-S", str(here / "sidecar.py"), str(here)), count=1),
    run_dir=here / "run", shutdown_timeout_s=%s, max_restarts=restarts, hang_timeout_s=1.5, stop_when_hung=True))
print(out.report(), file=sys.stderr)
sys.exit(out.exit_code)
"""


REAL_TRAINER = """
import os, pathlib, sys, time
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from kgt_ddp import FreezeAwareDDP
here, num_steps, rank = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(os.environ["RANK"])

def tell(name):
    (here / f"{name}.part").write_text(str(os.getpid())); (here / f"{name}.part").rename(here / name)

def tell_of_loader(_):
    tell(f"loader{rank}")

dist.init_process_group("gloo")
torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4)]
model = FreezeAwareDDP(nn.Sequential(*layers, nn.Linear(32, 4)), total_steps=450)  # a short job is not scored
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
inputs = torch.randn(16 * num_steps, 32)
data = TensorDataset(inputs, inputs[:, :4].argmax(1))
for step, (x, y) in enumerate(DataLoader(data, batch_size=16, num_workers=1, worker_init_fn=tell_of_loader)):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    if step == 3: tell(f"rank{rank}")
    time.sleep(0.05)
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Case:
    """What is done to whom, when."""

    target: str
    action: str
    delay_s: float
    restarts: int

    @classmethod
    def from_seed(cls, seed: int) -> Case:
        """Fifteen combinations in turn, at a moment that the seed decides."""
        dice = random.Random(seed)
        target, action = TARGETS[seed % 5], ACTIONS[seed // 5 % 3]
        return cls(target, action, dice.uniform(0.0, 2.0), int(dice.random() < 0.3))

    @property
    def hangs(self) -> bool:
        """Whether the ranks stand still until they are ended for it."""
        return self.action == "STOP" and self.target in ("rank 0", "rank 1", "loader")

    def expected(self) -> tuple[int, tuple[str, ...]]:
        """Exit code (as Popen has it) and parts of the message."""
        if self.target == "launcher":
            return {"KILL": (-9, ()), "STOP": (0, ()), "TERM": (143, ("ended by SIGTERM",))}[self.action]
        if self.target == "reference" or self.restarts:
            return 0, ()
        if self.hangs:
            return 124, ("no progress",)
        if self.target == "loader":  # rank 1's; with torch it may be a lost connection to it that is raised first
            return 1, ("First failure: rank 1 ", "Error")
        code = {"KILL": 137, "TERM": 143}[self.action]
        return code, (f"First failure: {self.target} ", f"SIG{self.action}")


def _wait(path: Path, timeout_s: float = 120.0) -> int:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"{path.name} did not come up within {timeout_s} s")
        time.sleep(0.01)
    return int(path.read_text())


def run_light(case: Case, here: Path) -> dict[str, float]:
    """Run one case in an empty directory; raises AssertionError with all that is known."""
    (here / "trainer.py").write_text(LIGHT_TRAINER)
    (here / "sidecar.py").write_text(SIDECAR)
    command = [sys.executable, "-c", DRIVER % GRACE_S, str(here), str(case.restarts)]
    return _run(case, here, command, reference=lambda: _wait(here / "reference"))


def run_real(case: Case, here: Path) -> dict[str, float]:
    """The same with a real job. A machine under load may take no step for seconds: only a case that hangs is ended so."""
    (here / "trainer.py").write_text(REAL_TRAINER)
    command = [sys.executable, "-m", "kgtrun", "--run-dir", str(here / "run"), "--nproc-per-node", "2"]
    command += ["--policy", "kgt", "--shutdown-timeout", f"{GRACE_S:g}", "--max-restarts", str(case.restarts)]
    command += ["--hang-timeout", "10", "--hang-action", "stop"] if case.hangs else []
    command += [str(here / "trainer.py"), str(here), str(NUM_REAL_STEPS)]
    return _run(case, here, command, reference=lambda: _reference(here / "run"))


def _reference(run_dir: Path) -> int:
    return next(event["child_pid"] for event in read_events(run_dir) if event["kind"] == "reference_start")


def _run(case: Case, here: Path, command: list[str], *, reference: Callable[[], int]) -> dict[str, float]:
    # Not below `here`: where TMPDIR is too long for sockets the launcher takes another.
    with tempfile.TemporaryDirectory() as temporary:
        return _run_in(Path(temporary), case, here, command, reference)


def _run_in(
    temporary: Path, case: Case, here: Path, command: list[str], reference: Callable[[], int]
) -> dict[str, float]:
    tag = f"{os.getpid()}-{here.name}-{time.monotonic_ns()}"
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(here / "inductor")}  # torch's own, and not to be counted
    process = subprocess.Popen(
        command,
        env={**os.environ, **caches, "TMPDIR": str(temporary), "FAULT_TAG": tag},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pids = {name: _wait(here / name) for name in ("rank0", "rank1", "loader0", "loader1")}
        keys = {"launcher": process.pid, "rank 0": pids["rank0"], "rank 1": pids["rank1"]}
        victim = {**keys, "reference": reference(), "loader": pids["loader1"]}[case.target]
        time.sleep(case.delay_s)
        begun = time.monotonic()
        os.kill(victim, getattr(signal, f"SIG{case.action}"))
        if (case.target, case.action) == ("launcher", "STOP"):
            time.sleep(0.5)
            os.kill(victim, signal.SIGCONT)
        _, err = process.communicate(timeout=180)
        return _check(case, here, temporary, tag, process.returncode, err, begun)
    finally:
        process_tree.send({process.pid} if process.poll() is None else (), signal.SIGKILL)
        process_tree.send(process_tree.members(f"FAULT_TAG={tag}"), signal.SIGKILL)


def _files_left(temporary: Path) -> list[Path]:
    """But for a socket's directory of a DataLoader worker that was killed: its own, in a place only torch knows."""
    return [path for path in temporary.iterdir() if not path.name.startswith("pymp-")]


def _check(case: Case, here: Path, temporary: Path, tag: str, code: int, err: str, begun: float) -> dict[str, float]:
    ended_s = time.monotonic() - begun
    deadline = time.monotonic() + GRACE_S + 20
    while process_tree.members(f"FAULT_TAG={tag}") and time.monotonic() < deadline:
        time.sleep(0.02)
    clean_s = time.monotonic() - begun
    left = process_tree.members(f"FAULT_TAG={tag}")
    wanted_code, words = case.expected()
    story = f"{case}\nexit code {code}, wanted {wanted_code}\n{err}"
    assert code == wanted_code, story
    assert all(word in err for word in words), story
    assert not left, f"{story}\nleft: {left}"
    assert not _files_left(temporary), f"{story}\nfiles left: {_files_left(temporary)}"
    if case.target != "launcher" or case.action != "KILL":
        result = json.loads((here / "run/result.json").read_text())
        assert result["exit_code"] == code, story
        if case.restarts and case.target in ("rank 0", "rank 1", "loader") and case.action != "STOP":
            assert result["restarts"] == 1, story
        if code == 0 and case.target == "reference" and case.action != "STOP":
            assert result["sidecars"]["given_up"] == 0, story
    if code not in (0, 124):
        # What is left over after the grace is the machine's load, not a wait of ours.
        assert clean_s < GRACE_S + 2 + 3 * os.getloadavg()[0], f"{story}\ntook {clean_s:.1f} s"
    return {"ended_s": ended_s, "clean_s": clean_s}
