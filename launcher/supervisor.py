"""One launch on this node, from the first process to the last.

Order of start: runtime directory, reaper, signals, ranks, side-cars (after the ranks, whose start must not wait for
them). Order of end: ranks, then side-cars, then whatever carries the launch's marker, then the runtime directory, then
the reaper. What happened is returned as an `Outcome` and written to the run directory; nothing is printed here but log
records. What an ending means is decided in `launcher.verdict`; what there is to end is found by `launcher.belongings`.

Raises:
    ValueError: the configuration does not fit this machine (a device that is not there, an unknown plug-in).
"""

from __future__ import annotations

import logging
import os
import signal
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from kgtrun.contract.events import EventWriter
from kgtrun.contract.run_dir import RunDir
from launcher import requeue
from launcher.attempt import Attempt
from launcher.belongings import Belongings
from launcher.config import LaunchConfig
from launcher.errors import LostRendezvousError
from launcher.leaving import Leaving
from launcher.links import Links
from launcher.logs import Follower
from launcher.outcome import Outcome
from launcher.peers import Peers
from launcher.progress import Progress, ProgressMeter
from launcher.runtime_dir import RuntimeDir, make_shared
from launcher.sidecar import Sidecar, SidecarKeeper
from launcher.signals import SignalDesk, Stopped
from launcher.spawn_environment import SpawnEnvironment
from launcher.verdict import Verdict

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerGroup

    from launcher.elastic import RankAgent

logger = logging.getLogger(__name__)

_USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
_SIDECAR_GRACE_S = 5.0


def launch(config: LaunchConfig) -> Outcome:
    """Start everything, wait for the end, leave nothing behind. `Supervisor` lets a caller watch meanwhile."""
    return Supervisor(config).run()


class Supervisor:
    """State of one launch. Call `run` once."""

    def __init__(self, config: LaunchConfig) -> None:
        self.config = config
        self.begun_s = time.monotonic()
        self.run_dir = RunDir(config.run_dir).create()
        self.runtime = RuntimeDir.create()
        launch_id = uuid.uuid4().hex
        shared = config.sidecars.directory if config.sidecars.count else None
        if shared:
            make_shared(shared)
        directories = [self.runtime.root, *([shared] if shared else [])]
        # The reaper is forked here, while this process is small and has one thread.
        self.belongings = Belongings(launch_id, directories, grace_s=config.shutdown_timeout_s)
        self.events = EventWriter.for_process(config.run_dir, role="launcher", index=config.rendezvous.node_rank)
        self.environment = SpawnEnvironment(config, self.runtime, launch_id)
        self.follower = Follower()
        self.agent: RankAgent | None = None
        self.attempt: Attempt | None = None
        self.peers: Peers | None = None
        self.leaving = Leaving(config.batch, forbid_restarts=self._forbid_restarts)
        self.links = Links(config.peer_timeout_s if config.rendezvous.max_nodes > 1 else 0)
        self._meter = ProgressMeter()
        self.keeper = SidecarKeeper(
            config.sidecars,
            self.run_dir.logs,
            environment_of=self.environment.of_sidecar,
            event=self.events.write,
            started=self._on_sidecar_start,
        )
        self.verdict = Verdict(begun_s=self.begun_s, hang_timeout_s=config.hang_timeout_s, sidecars=self.keeper.summary)
        self.desk = SignalDesk(
            stop=config.stop_signals,
            forward=_USER_SIGNALS,
            targets=lambda: self.attempt.running() if self.attempt else [],
            last_resort=self._last_resort,
            grace_s=config.shutdown_timeout_s,
            forwarded=self.leaving.forwarded,
        )

    def progress(self) -> Progress | None:
        """How far the ranks that run are, None without any; from any thread."""
        return self._meter.look(map(self.runtime.heartbeat, self.attempt.running_ranks())) if self.attempt else None

    def run(self) -> Outcome:
        """The whole launch; whatever happens, nothing is left when it returns or raises."""
        outcome = None
        try:
            outcome = self._run_ranks()
        except Stopped as stopped:
            outcome = self.verdict.signalled(self.attempt, stopped.sigval)
        finally:
            self.desk.concluding(self._conclusion_s)
            self._end_everything()
            if outcome is not None:
                outcome = self.leaving.conclude(outcome, self.peers, grace_s=self.config.shutdown_timeout_s)
                self._finish(outcome)
            if self.peers is not None:
                self.peers.close()
            self.links.close()
            self.desk.close()
            self.belongings.dismiss_reaper()
        return outcome

    @property
    def _conclusion_s(self) -> float:
        """How long the end may take from the ranks' end on: what they left, the references, the other nodes, Slurm."""
        return 3 * self.config.shutdown_timeout_s + 3 * requeue.COMMAND_TIMEOUT_S

    def _run_ranks(self) -> Outcome:
        from launcher import elastic

        self.desk.raises = elastic.StoppedInElastic
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(s.name for s in self.config.stop_signals)
        num_ranks = elastic.count_ranks(self.config.ranks.count)
        cores = self.environment.share_cores(num_ranks)
        logger.info("%s", cores)
        try:
            self.agent = elastic.build_agent(
                self.config,
                num_ranks=num_ranks,
                environment=self.environment.of_rank,
                stop=self._stop_ranks,
                started=self._on_start,
                failed=lambda: self.attempt is not None and self.attempt.failed(),
                all_ended=lambda: self.attempt is None or not self.attempt.running(),
                follower=self.follower,
                peers_failed=self._peers_failed,
                await_peers=self._await_peers,
                leaving=lambda: self.leaving.running(self.attempt),
                collect=self._reap_adopted,
            )
            if self.config.rendezvous.node_rank == 0:
                # What an earlier start of this run ended with is no end of this one.
                Path(self.run_dir.result).unlink(missing_ok=True)
            self.events.write("start", num_ranks=num_ranks, num_references=self.config.sidecars.count, cores=cores)
            result = elastic.run(self.agent, self.config.event_log_handler)
        except LostRendezvousError as error:
            return self.verdict.failed(self.attempt, self.peers, str(error))
        return self.verdict.ended(self.attempt, self.peers, failed=result is not None and result.is_failed())

    # What the agent and the keeper call.

    def _on_start(self, number: int, pids: dict[int, int], group: WorkerGroup) -> None:
        for local_rank, pid in pids.items():
            self.belongings.watch(pid)
            self.environment.pin(local_rank, pid)
        self.attempt = Attempt(
            number,
            pids,
            {worker.local_rank: worker.global_rank for worker in group.workers},
            config=self.config,
            runtime=self.runtime,
            begun_s=self.begun_s,
            event=self.events.write,
        )
        assert group.store is not None and group.group_rank is not None and group.group_world_size is not None
        if self.peers is not None:
            self.peers.close()
        self.peers = Peers(
            group.store,
            node=group.group_rank,
            num_nodes=group.group_world_size,
            timeout_s=self.config.peer_timeout_s,
            endpoint=self.config.rendezvous.endpoint,
        )
        self.desk.install()  # torch has just put its own handlers in place
        self.events.write("ranks_start", attempt=number, pids=pids, ranks=self.attempt.global_ranks)
        self.keeper.start()

    def _peers_failed(self) -> bool:
        if self.peers is None or not self.peers.failed():
            return False
        if self.peers.lost is not None:
            logger.warning("%s", self.peers.lost)
            if self.config.rendezvous.backend == "static":
                self._forbid_restarts()  # its ranks have fixed places: nobody can take that of the lost node
            return True
        # Ranks there have lost their connections: one of ours may be about to say why.
        told = self.attempt is None or not self.attempt.may_tell_more(self.peers.saw_failure_s)
        return told or not self.peers.only_reactions()

    def _await_peers(self, wait_s: float) -> None:
        if self.peers is not None:
            self.peers.ended(wait_s=wait_s, patient=True)

    def _forbid_restarts(self) -> None:
        from launcher import elastic

        if self.agent is not None:
            elastic.forbid_restarts(self.agent)

    def _on_sidecar_start(self, sidecar: Sidecar) -> None:
        assert sidecar.pid is not None
        self.belongings.watch(sidecar.pid)

    def _stop_ranks(self, signum: signal.Signals) -> None:
        """End the ranks of this start and all they started; side-cars stay."""
        from launcher import elastic

        if self.attempt is None or self.agent is None:
            return
        attempt, agent = self.attempt, self.agent

        attempt.stop(
            signum,
            find=lambda: self.belongings.find(attempt.pids.values(), spare=self.keeper.pids()),
            hurry=self.desk.hurry,
            between=self._reap_adopted,
            stderr_of=lambda local_rank: elastic.stderr_path(agent, local_rank),
            torch_error_of=lambda local_rank: elastic.error_path(agent, local_rank),
            excused=self.leaving.excused,
        )
        peers, failures = self.peers, attempt.failures
        failed_here = attempt.hung.is_set() or any(not failure.consequence for failure in failures)
        if peers is not None and not self.desk.received and (failed_here or peers.lost) and peers.some_ended():
            self._forbid_restarts()  # nobody would meet the ranks of the next start there
        if (
            peers is None
            or self.desk.received
            or self.leaving.running(attempt) is not None
            or not elastic.is_last_attempt(agent)
        ):
            return
        if failures or attempt.hung.is_set() or peers.failed():
            own = failures[0] if failures and not failures[0].consequence else None
            peers.publish(own, self.verdict.unix_time(own) if own else time.time(), hung=attempt.hung.is_set())

    def _reap_adopted(self) -> None:
        ranks = self.attempt.pids.values() if self.attempt else ()
        self.belongings.collect(owned=[*self.keeper.pids(), *ranks])

    # The end.

    def _end_everything(self) -> None:
        self.keeper.stop_watching()
        self._stop_ranks(signal.SIGTERM)
        self.belongings.end(
            self.keeper.pids(),
            grace_s=min(_SIDECAR_GRACE_S, self.config.shutdown_timeout_s),
            hurry=self.desk.hurry,
            between=self._reap_adopted,
        )
        self.keeper.reap()
        for _ in range(2):  # what is seen once is collected at the next look
            self._reap_adopted()
        self.follower.stop()
        self.belongings.remove_directories()

    def _finish(self, outcome: Outcome) -> None:
        """Write the end into the run directory."""
        self.events.write("end", status=outcome.status, exit_code=outcome.exit_code, seconds=outcome.seconds)
        if self.config.rendezvous.node_rank == 0:
            try:
                outcome.write(Path(self.run_dir.result))
            except OSError as error:
                logger.warning("%s cannot be written: %s", self.run_dir.result, error)

    def _last_resort(self, signum: signal.Signals) -> None:
        """From the signal thread: the main thread is stuck where no signal handler runs. End it all and go."""
        self.keeper.stop_watching()
        self.belongings.kill(self.keeper.pids)
        self.belongings.remove_directories()
        message = f"ended by {signum.name}, by force: the launcher was stuck"
        self._finish(self.verdict.signalled(self.attempt, signum, message))
        logger.warning("%s", message)
        self.belongings.dismiss_reaper()
        os._exit(128 + signum)
