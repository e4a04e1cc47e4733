"""--numa-binding, end to end, on a machine of two cores that is made out to have two NUMA nodes with a GPU each.

Torch reads the node of a GPU and the cores of a node by functions that are replaced; what it makes of them, how it
starts the ranks through numactl (a stand-in with the same argument, for none need be installed) and what our own
sharing of cores does meanwhile are real. No machine with several NUMA nodes was at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, one for each node"),
]

NUMACTL = f"""#!{sys.executable} -S
import os, sys
option, cpus = sys.argv[1].split("=")
assert option == "--physcpubind"
os.sched_setaffinity(0, {{int(cpu) for cpu in cpus.split(",")}})
os.execvp(sys.argv[2], sys.argv[2:])
"""

# Our own sharing would give each rank the core on the other node.
TWO_NODES = """
import os, sys
import torch
from torch.numa import binding
from launcher import affinity
cpus = sorted(os.sched_getaffinity(0))[:2]
torch.cuda.device_count = lambda: 2
binding._get_numa_node_index_for_gpu_index = lambda *, gpu_index: gpu_index
binding._get_cpu_indices_for_numa_node_MAYBE_NOT_ALLOWED = lambda *, numa_node_index: {cpus[numa_node_index]}
affinity.share = lambda *_, **__: affinity.Shares(
    ranks=(frozenset({cpus[1]}), frozenset({cpus[0]})), sidecars=(), rank_threads=1, sidecar_threads=1, words="crossed")
from kgtrun.cli import main
sys.exit(main(sys.argv[1:]))
"""

SAYS = "import os; print(os.environ['RANK'], *os.sched_getaffinity(0), 'KGTRUN_CPUS' in os.environ, flush=True)"


def run(runs, *options: str):
    (runs.directory / "numactl").write_text(NUMACTL)
    (runs.directory / "numactl").chmod(0o755)
    environment = runs.environment(PATH=f"{runs.directory}:{os.environ['PATH']}")
    command = [sys.executable, "-c", TWO_NODES, "--run-dir", str(runs.directory / "run"), "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [*command, "--log-prefix", " ", *options, runs.script(SAYS)]
    done = runs.finish(subprocess.Popen(line, env=environment, start_new_session=True, **pipes))
    assert done.code == 0, done.err
    return sorted(line.split() for line in done.out.splitlines())


def test_ranks_are_on_the_node_of_their_gpu_and_our_sharing_stays_away(runs):
    first, second = map(str, sorted(os.sched_getaffinity(0))[:2])
    assert run(runs, "--numa-binding", "node") == [["0", first, "False"], ["1", second, "False"]]


def test_without_it_ranks_get_our_share(runs):
    first, second = map(str, sorted(os.sched_getaffinity(0))[:2])
    assert run(runs) == [["0", second, "True"], ["1", first, "True"]]
