"""Several hosts on this machine for a test: see README.md and `netns-cluster` in this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TOOL = str(HERE / "netns-cluster")

missing = [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]
needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or bool(missing), reason=f"hosts of namespaces need root and iproute2, util-linux ({missing})"
)


class Hosts:
    """A cluster that is up. Every command is bounded."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ

    def start(self, host: str, *command: str, **environ: str) -> subprocess.Popen[str]:
        """Start a command on a host; output of both streams is captured as one."""
        return subprocess.Popen(
            [TOOL, "exec", host, *command],
            env={**self._environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, host: str, *command: str, timeout_s: float = 60, **environ: str) -> str:
        """Run a command on a host to its end and return its output; it must succeed."""
        process = self.start(host, *command, **environ)
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, f"{' '.join(command)} on {host}: exit {process.returncode}\n{output}"
        return output

    def limit(self, host: str, rate: str, delay: str = "none") -> None:
        self._tool("limit", host, rate, delay)

    def kill(self, host: str) -> None:
        self._tool("kill", host)

    def link(self, host: str, state: str) -> None:
        """Cable in ("up") or out ("down")."""
        self.run("login", "ip", "link", "set", f"v{host[1:]}", state)

    def _tool(self, *args: str) -> None:
        subprocess.run([TOOL, *args], env=self._environ, check=True, timeout=60, stdin=subprocess.DEVNULL)


@contextmanager
def hosts(count: int, folder: Path, *, rate: str | None = None, delay: str | None = None) -> Iterator[Hosts]:
    """`count` hosts h0, h1, … for the time of a test."""
    environ = {**os.environ, "NETNS_CLUSTER_DIR": str(folder)}
    options = [*(["--rate", rate] if rate else []), *(["--delay", delay] if delay else [])]
    subprocess.run([TOOL, "up", str(count), *options], env=environ, check=True, timeout=60, stdin=subprocess.DEVNULL)
    try:
        yield Hosts(environ)
    finally:
        subprocess.run([TOOL, "down"], env=environ, check=True, timeout=60, stdin=subprocess.DEVNULL)
