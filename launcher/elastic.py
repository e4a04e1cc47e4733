"""The rank agent, put together from torch.distributed.elastic.

Owns: rendezvous, the ranks of this node, restarts of the worker group. Adds to torch's agent: an environment per spawn
(from `LogsSpecs.reify`, which sees the environment of each local rank before it starts), the order in which ranks
ended, one grace on every path, and whole trees. Never knows what a side-car is.

This module imports torch; the rest of the package does not.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch
import torch.distributed.elastic.rendezvous.registry as rendezvous_registry
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic import events, metrics
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, LogsSpecs, SignalException, Std
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import determine_local_world_size
from torch.numa.binding import AffinityMode, NumaOptions

from launcher import torch_private
from launcher.config import BOTH, NO_STREAM, LaunchConfig, LogSpec, RendezvousSpec, Streams
from launcher.errors import LostRendezvousError
from launcher.logs import Follower, console, matching
from launcher.signals import Stopped

RENDEZVOUS_TIMEOUT_S = 900
COLLECT_INTERVAL_S = 1.0
DEFAULT_PREFIX = "${host}:${rank}: "
EnvironmentOfRank = Callable[[int, Mapping[str, str]], Mapping[str, str]]
"""Local rank, what torch sets for it → what to add for it."""


class StoppedInElastic(Stopped, SignalException):
    """A stop signal, as the agent understands it: it forwards the signal and waits for the ranks."""


def count_ranks(word: str) -> int:
    """Ranks of this node from a number or one of torch's words.

    Raises:
        ValueError: neither, or no such device here.
    """
    try:
        return determine_local_world_size(word)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--nproc-per-node {word}: {error}; use a number, auto, cpu, gpu or xpu") from error


def numa_options(mode: str | None, num_ranks: int) -> NumaOptions | None:
    """What --numa-binding asks of torch, which looks for the cores near each rank's GPU only when it starts the rank.

    Raises:
        ValueError: it could not do so here.
    """
    if mode is None:
        return None
    num_gpus = torch.cuda.device_count()
    if num_gpus < num_ranks:
        raise ValueError(
            f"--numa-binding {mode}: ranks are bound to the cores near their GPU, and {num_ranks} ranks find {num_gpus} "
            "GPUs here; leave it out, and ranks get cores by NUMA node where there are enough"
        )
    if shutil.which("numactl") is None:
        raise ValueError(f"--numa-binding {mode}: torch needs the program numactl, which is not installed here")
    return NumaOptions(affinity_mode=AffinityMode(mode))


def streams(spec: Streams) -> Std | dict[int, Std]:
    """Our notation of streams as torch's."""
    return Std(spec) if isinstance(spec, int) else {rank: Std(value) for rank, value in spec.items()}


def teed(spec: LogSpec, num_ranks: int) -> Streams:
    """Streams that go to files and to the console: those asked for, else all that are not redirected."""
    if spec.tee is not None:
        return spec.tee
    redirects = spec.redirects
    if isinstance(redirects, int):
        return BOTH & ~redirects
    return {rank: BOTH & ~redirects.get(rank, NO_STREAM) for rank in range(num_ranks)}


class RankLogs(DefaultLogsSpecs):
    """Where ranks log, how that reaches the console, and what is added to the environment of each at each spawn.

    Torch's own console output splits lines where a process flushes, so it gets nothing to follow: ours follows.
    """

    def __init__(self, spec: LogSpec, num_ranks: int, environment: EnvironmentOfRank, follower: Follower) -> None:
        super().__init__(
            log_dir=str(spec.directory),
            redirects=streams(spec.redirects),
            tee=streams(teed(spec, num_ranks)),
            local_ranks_filter=set(spec.only_ranks) or None,
        )
        torch_private.set_log_directory(self, str(spec.directory))
        self._spec, self._environment, self._follower = spec, environment, follower

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for local_rank, its in envs.items():
            its.update(self._environment(local_rank, its))
        destination = super().reify(envs)
        for tee, stream, words, filtered in (
            (destination.tee_stdouts, sys.stdout, self._spec.stdout_filters, destination.filtered_stdout),
            (destination.tee_stderrs, sys.stderr, self._spec.stderr_filters, destination.filtered_stderr),
        ):
            for local_rank, path in tee.items():
                prefix = line_prefix(self._spec, envs[local_rank], local_rank)
                self._follower.follow(path, prefix, console(stream))
                if words:
                    self._follower.follow(path, prefix, matching(words, Path(filtered)))
            tee.clear()
        return destination


def line_prefix(spec: LogSpec, its: Mapping[str, str], local_rank: int) -> str:
    """Prefix of a rank's console lines; torchrun's variable for it keeps its meaning, the option wins."""
    template = spec.prefix or os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE") or DEFAULT_PREFIX
    return Template(template).safe_substitute(
        host=socket.gethostname(), rank=its["RANK"], local_rank=local_rank, role_name=its["ROLE_NAME"]
    )


class RankAgent(LocalElasticAgent):
    """Torch's local agent with our supervision. `stop(signum)` ends every rank and what it started."""

    def __init__(
        self,
        *args: Any,
        stop: Callable[[signal.Signals], object],
        started: Callable[[int, dict[int, int], WorkerGroup], object],
        failed: Callable[[], bool],
        all_ended: Callable[[], bool],
        follower: Follower,
        peers_failed: Callable[[], bool],
        await_peers: Callable[[float], object],
        leaving: Callable[[], int | None],
        collect: Callable[[], object],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._stop, self._started, self._failed, self._follower = stop, started, failed, follower
        self._peers_failed, self._await_peers, self._leaving = peers_failed, await_peers, leaving
        self._all_ended, self._collect, self._collected_s = all_ended, collect, time.monotonic()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        attempt = worker_group.spec.max_restarts - torch_private.restarts_left(self)
        self._started(attempt, pids, worker_group)
        torch_private.hold_polls(torch_private.worker_context(self), self._all_ended)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if time.monotonic() - self._collected_s >= COLLECT_INTERVAL_S:
            self._collect()
            self._collected_s = time.monotonic()
        running = self._leaving()
        if running is not None:
            # Each rank saves what it must and ends when it is ready: torch would end all others with the first one.
            if running:
                return RunResult(state=WorkerState.HEALTHY)
            self._shutdown(signal.SIGTERM)
            values = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=values)
        # Torch's own reaction to a failed rank waits 30 s whatever the user asked for, and signals no grandchildren:
        # end them here, so that it finds nothing left to do.
        if self._failed():
            self._shutdown(signal.SIGTERM)
            result = super()._monitor_workers(worker_group)
            # Ranks that were ended for a hang, and end with 0 then, have not succeeded.
            return result if result.state == WorkerState.FAILED else RunResult(state=WorkerState.FAILED)
        if self._peers_failed():
            # Whatever code our ranks end with: a success would wait for the other nodes at torch's exit barrier.
            self._shutdown(signal.SIGTERM)
            return RunResult(state=WorkerState.FAILED)
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        # Torch's own waits its 300 s for a node whose ranks have failed meanwhile, and then calls that a success.
        self._await_peers(self._exit_barrier_timeout)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # `timeout` is torch's default on half of the paths; ours is the user's, on all of them.
        context = torch_private.worker_context(self)
        if context is not None:
            self._stop(death_sig)
        super()._shutdown(death_sig, 0)
        self._follower.drain()


def rendezvous_parameters(spec: RendezvousSpec) -> RendezvousParameters:
    """Torch's parameters from ours; static rendezvous takes the node's rank here."""
    settings: dict[str, Any] = dict(spec.settings)
    if spec.backend == "static":
        settings["rank"] = spec.node_rank
    settings.setdefault("timeout", RENDEZVOUS_TIMEOUT_S)
    return RendezvousParameters(
        backend=spec.backend,
        endpoint=spec.endpoint,
        run_id=spec.run_id,
        min_nodes=spec.min_nodes,
        max_nodes=spec.max_nodes,
        local_addr=spec.local_addr,
        **settings,
    )


def build_agent(
    config: LaunchConfig,
    *,
    num_ranks: int,
    environment: EnvironmentOfRank,
    stop: Callable[[signal.Signals], object],
    started: Callable[[int, dict[int, int], WorkerGroup], object],
    failed: Callable[[], bool],
    follower: Follower,
    all_ended: Callable[[], bool] = lambda: True,
    peers_failed: Callable[[], bool] = lambda: False,
    await_peers: Callable[[float], object] = lambda _: None,
    leaving: Callable[[], int | None] = lambda: None,
    collect: Callable[[], object] = lambda: None,
) -> RankAgent:
    """Assemble the agent of one launch; nothing is started.

    `failed` says that the ranks are to be ended, `all_ended` that none runs and how each ended is known.
    `await_peers` waits until the ranks of all other nodes have ended, too; for the seconds it is given, or longer.
    `leaving` says how many ranks still run where the ranks were asked to save and end, None where they were not.
    `collect` is called about once a second while ranks run, to reap orphans.
    """
    parameters = rendezvous_parameters(config.rendezvous)
    if config.rendezvous.min_nodes != config.rendezvous.max_nodes:
        # Torch 2.13 tells nodes the address of the ranks' store in the first round only, if the store is the agents' own:
        # a node that joins later waits for it until the rendezvous times out. With a store of the ranks' own, every round.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        handler = rendezvous_registry.get_rendezvous_handler(parameters)
    except RendezvousError as error:  # c10d connects here and now
        raise LostRendezvousError(f"no rendezvous at {parameters.endpoint}: {error}") from error
    torch_private.new_store_each_round(handler)
    master_addr, master_port = None, None
    if parameters.backend == "static":
        master_addr, master_port = parse_rendezvous_endpoint(parameters.endpoint, default_port=29500)
    spec = WorkerSpec(
        role=config.ranks.role,
        local_world_size=num_ranks,
        entrypoint=config.ranks.command[0],
        args=tuple(config.ranks.command[1:]),
        rdzv_handler=handler,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval_s,
        master_addr=master_addr,
        master_port=master_port,
        local_addr=config.rendezvous.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=numa_options(config.ranks.numa_binding, num_ranks),
        virtual_local_rank=config.ranks.virtual_local_rank,
    )
    return RankAgent(
        spec,
        log_specs(config.logs, num_ranks, environment, follower),
        shutdown_timeout=int(config.shutdown_timeout_s),
        stop=stop,
        started=started,
        failed=failed,
        all_ended=all_ended,
        follower=follower,
        peers_failed=peers_failed,
        await_peers=await_peers,
        leaving=leaving,
        collect=collect,
    )


def log_specs(spec: LogSpec, num_ranks: int, environment: EnvironmentOfRank, follower: Follower) -> LogsSpecs:
    """Ours, or the plug-in the user named with --logs-specs (which then decides about the environment, too).

    Raises:
        ValueError: no plug-in of this name is installed.
    """
    if spec.specs_plugin is None:
        return RankLogs(spec, num_ranks, environment, follower)
    from importlib.metadata import entry_points

    found = entry_points(group="torchrun.logs_specs", name=spec.specs_plugin)
    if not found:
        known = sorted(entry.name for entry in entry_points(group="torchrun.logs_specs"))
        raise ValueError(
            f"--logs-specs {spec.specs_plugin}: no such entry point in torchrun.logs_specs; there is {known}"
        )
    plugin = next(iter(found)).load()

    class PluginLogs(plugin):  # type: ignore[misc, valid-type]
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            for local_rank, its in envs.items():
                its.update(environment(local_rank, its))
            return super().reify(envs)

    return PluginLogs(
        log_dir=str(spec.directory),
        redirects=streams(spec.redirects),
        tee=streams(teed(spec, num_ranks)),
        local_ranks_filter=set(spec.only_ranks) or None,
    )


def is_last_attempt(agent: RankAgent) -> bool:
    """Whether no restart is left."""
    return torch_private.restarts_left(agent) == 0


def forbid_restarts(agent: RankAgent) -> None:
    """From now on a failure is final."""
    torch_private.forbid_restarts(agent)


def run(agent: RankAgent, event_log_handler: str) -> RunResult | None:
    """Run the agent to its end; None when the rendezvous was closed in order by another node.

    Raises:
        LostRendezvousError: other nodes cannot be reached, or have closed the rendezvous.

    The rendezvous is shut down for everyone unless a signal ended us: then the others may go on without this node.
    """
    if "LOGLEVEL" not in os.environ:
        # Torch reports each failed rank on its own, in no order; the outcome says it once and better.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    metrics.initialize_metrics(metrics.MetricsConfig({}))
    handler = agent.get_worker_group().spec.rdzv_handler
    close = True
    try:
        result = agent.run()
        events.record(agent.get_event_succeeded(), event_log_handler)
        return result
    except SignalException as error:
        close = False
        events.record(agent.get_event_failed(), event_log_handler)
        if not isinstance(error, Stopped):  # from torch's handlers, which are in place until the ranks have started
            raise StoppedInElastic(str(error), signal.Signals(error.sigval)) from error
        raise
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        close = False
        events.record(agent.get_event_failed(), event_log_handler)
        raise LostRendezvousError(f"the other nodes cannot be reached: {type(error).__name__}: {error}") from error
    except Exception:
        events.record(agent.get_event_failed(), event_log_handler)
        raise
    finally:
        if close:
            handler.shutdown()


def stderr_path(agent: RankAgent, local_rank: int) -> Path | None:
    """File of a rank's stderr, None where it goes to the console alone."""
    context = torch_private.worker_context(agent)
    path = context.stderrs.get(local_rank) if context else None
    return Path(path) if path and path != os.devnull else None


def error_path(agent: RankAgent, local_rank: int) -> Path | None:
    """Torch's error file of a rank, written by scripts that use @record."""
    context = torch_private.worker_context(agent)
    path = context.error_files.get(local_rank) if context else None
    return Path(path) if path else None
