"""One launch of kgtrun over hosts of namespaces, for tests that break something under it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.hosts import HERE, Hosts

ROOT = str(HERE.parents[1])
PEER_TIMEOUT_S, GRACE_S, SLACK_S = 6, 3, 15
BOUND_S = PEER_TIMEOUT_S + GRACE_S + SLACK_S
"""The stated bound: `--peer-timeout`, then `--shutdown-timeout` for ranks that do not end at once, and a few seconds."""


class Launch:
    """A kgtrun with one rank on each of the hosts h0, h1, …; `script` are the job and its arguments."""

    def __init__(
        self, cluster: Hosts, folder: Path, *script: str, options: tuple[str, ...] = (), count: int = 2
    ) -> None:
        self.cluster, self.folder = cluster, folder
        self.script, self.options, self.count = script, options, count
        folder.mkdir(exist_ok=True)
        self.launchers: dict[str, subprocess.Popen[str]] = {}
        for node in range(count):
            self.start(node)

    def start(self, node: int) -> None:
        self.launchers[f"h{node}"] = self.cluster.start(
            f"h{node}",
            sys.executable, "-m", "kgtrun",
            "--nnodes", str(self.count), "--node-rank", str(node), "--master-addr", "h0", "--master-port", "29400",
            "--peer-timeout", str(PEER_TIMEOUT_S), "--shutdown-timeout", str(GRACE_S),
            "--policy", "static:blocks=2,step=9", "--run-dir", str(self.folder / "run"),
            *self.options, *self.script,
            PYTHONPATH=ROOT,
        )  # fmt: skip

    def end(self, host: str, timeout_s: float) -> tuple[int, str, float]:
        """Exit code, output and seconds until the launcher of `host` ended."""
        begun = time.monotonic()
        try:
            output, _ = self.launchers[host].communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.launchers[host].kill()
            raise AssertionError(f"the launcher of {host} had not ended after {timeout_s} s") from None
        return self.launchers[host].returncode, output, time.monotonic() - begun
