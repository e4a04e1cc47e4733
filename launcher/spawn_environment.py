"""What ranks and side-cars find in their environment beyond what torchelastic sets: paths of this launch, and cores.

The user's own settings win: with OMP_NUM_THREADS set, or a NUMA binding asked for, nothing of that is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping

from kgtrun.contract import environment as names
from launcher import affinity
from launcher.config import LaunchConfig
from launcher.runtime_dir import RuntimeDir
from launcher.topology import format_cpus, read_topology


class SpawnEnvironment:
    """Builds the environments of one launch; `share_cores` first, once the number of ranks is known."""

    def __init__(self, config: LaunchConfig, runtime: RuntimeDir, launch_id: str) -> None:
        self._config, self._runtime = config, runtime
        self._shares: affinity.Shares | None = None
        its = config.sidecars
        references = its.count if its.on_node is None else its.on_node
        self._common = {
            names.LAUNCH_ID: launch_id,
            names.RUN_DIR: str(config.run_dir.resolve()),
            names.RUNTIME_DIR: str(runtime.root),
            names.REFERENCE_DIR: str(config.sidecars.directory or runtime.reference),
            names.NUM_REFERENCES: str(references),
        }

    def share_cores(self, num_ranks: int) -> str:
        """Decide who gets which cores and return it in words; without sharing, torchrun's rule for OMP_NUM_THREADS."""
        if not self._config.share_cores:
            if num_ranks > 1:
                os.environ.setdefault("OMP_NUM_THREADS", "1")
            return "cores are not shared out"
        self._shares = affinity.share(
            dataclasses.replace(read_topology(), granted=self._config.granted_cores),
            num_ranks=num_ranks,
            num_sidecars=self._config.sidecars.count,
            taken=affinity.taken_by_others(names.CPUS),
        )
        theirs = os.environ.get("OMP_NUM_THREADS")
        return self._shares.words + (f" (OMP_NUM_THREADS={theirs} is yours and stays)" if theirs else "")

    def of_rank(self, local_rank: int, its: Mapping[str, str]) -> dict[str, str]:
        """Added to what torch sets for one rank (`its`), just before it starts."""
        beats = self._runtime.heartbeat(local_rank)
        error = self._runtime.error(local_rank, int(its["TORCHELASTIC_RESTART_COUNT"]))
        for former in (beats, error):  # of the start before this one; a node that joins starts all again, uncounted
            former.unlink(missing_ok=True)
        return {
            **self._config.ranks.environment,
            **self._common,
            **(self._cores(self._shares.ranks[local_rank], self._shares.rank_threads) if self._shares else {}),
            names.RANK_ON_NODE: str(self._config.sidecars.first_rank + local_rank),
            names.HEARTBEAT: str(beats),
            names.STACK_FILE: str(self._runtime.stacks(local_rank)),
            names.ERROR_FILE: str(error),
        }

    def of_sidecar(self, index: int) -> dict[str, str]:
        """Added to the launcher's own environment for one side-car."""
        shares = self._shares
        cores = self._cores(shares.sidecars[index], shares.sidecar_threads) if shares else {}
        return {**self._config.sidecars.environment, **self._common, **cores}

    def pin(self, local_rank: int, pid: int) -> None:
        """Give a rank that has just started its cores; the boot step does the same, a bare program relies on this."""
        if self._shares and self._shares.ranks[local_rank] and not self._config.ranks.numa_binding:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(pid, self._shares.ranks[local_rank])

    def _cores(self, cpus: frozenset[int], threads: int) -> dict[str, str]:
        found = {"OMP_NUM_THREADS": str(threads)} if threads and "OMP_NUM_THREADS" not in os.environ else {}
        if cpus and not self._config.ranks.numa_binding:
            found[names.CPUS] = format_cpus(cpus)
        return found
