"""One launch on this node, from the first process to the last.

Order of start: runtime directory, reaper, signals, ranks, side-cars (after the ranks, whose start must not wait for
them). Order of end: ranks, then side-cars, then whatever carries the launch's marker, then the runtime directory, then
the reaper. What happened is returned as an `Outcome` and written to the run directory; nothing is printed here.

Raises:
    ValueError: the configuration does not fit this machine (a device that is not there, an unknown plug-in).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kgtrun.contract import environment as names
from kgtrun.contract.events import EventWriter
from kgtrun.contract.run_dir import RunDir
from launcher import first_failure, process_tree
from launcher.config import LaunchConfig
from launcher.logs import Follower
from launcher.outcome import FAILED, SIGNALLED, SUCCEEDED, Failure, Outcome
from launcher.reaper import Reaper
from launcher.runtime_dir import RuntimeDir
from launcher.sidecar import SidecarKeeper
from launcher.signals import SignalDesk, Stopped

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerGroup

    from launcher.elastic import RankAgent
    from launcher.endings import EndingWatch

logger = logging.getLogger(__name__)

_USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


def launch(config: LaunchConfig) -> Outcome:
    """Start everything, wait for the end, leave nothing behind."""
    return Supervisor(config).run()


class Supervisor:
    """State of one launch. Call `run` once."""

    def __init__(self, config: LaunchConfig) -> None:
        self.config = config
        self.begun_s = time.monotonic()
        self.launch_id = uuid.uuid4().hex
        self.run_dir = RunDir(config.run_dir).create()
        self.runtime = RuntimeDir.create()
        # Forked first, while this process is small and has one thread.
        self.reaper = Reaper(
            marker=self.marker, directories=[str(self.runtime.root)], grace_s=config.shutdown_timeout_s
        )
        become_subreaper()
        self.events = EventWriter.for_process(config.run_dir, role="launcher", index=config.rendezvous.node_rank)
        self.agent: RankAgent | None = None
        self.watch: EndingWatch | None = None
        self.attempt = 0
        self.ended_by_us_s: float | None = None
        self.global_ranks: dict[int, int] = {}
        self.failures: tuple[Failure, ...] = ()
        self.follower = Follower()
        self.keeper = SidecarKeeper(
            config.sidecars,
            [self._sidecar_environment() for _ in range(config.sidecars.count)],
            self.run_dir.logs,
            event=self.events.write,
            started=self.reaper.watch,
        )
        self.desk = SignalDesk(
            stop=config.stop_signals,
            forward=_USER_SIGNALS,
            targets=lambda: self.watch.running() if self.watch else [],
            last_resort=self._last_resort,
            grace_s=config.shutdown_timeout_s,
        )

    @property
    def marker(self) -> str:
        return f"{names.LAUNCH_ID}={self.launch_id}"

    def run(self) -> Outcome:
        outcome = None
        try:
            outcome = self._run_ranks()
        except Stopped as stopped:
            outcome = self._outcome(SIGNALLED, 128 + stopped.sigval, signal_name=stopped.sigval.name)
        finally:
            self._end_everything()
            if outcome is not None:
                self.finish(outcome)
            self.desk.close()
            self.reaper.dismiss()
        return outcome

    def finish(self, outcome: Outcome) -> None:
        """Write the end into the run directory."""
        self.events.write("end", status=outcome.status, exit_code=outcome.exit_code, seconds=outcome.seconds)
        if self.config.rendezvous.node_rank == 0:
            try:
                outcome.write(self.run_dir.result)
            except OSError as error:
                logger.warning("%s cannot be written: %s", self.run_dir.result, error)

    def _run_ranks(self) -> Outcome:
        from launcher import elastic

        self.desk.raises = elastic.StoppedInElastic
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(s.name for s in self.config.stop_signals)
        num_ranks = elastic.count_ranks(self.config.ranks.count)
        if "OMP_NUM_THREADS" not in os.environ and num_ranks > 1:
            os.environ["OMP_NUM_THREADS"] = "1"
        self.agent = elastic.build_agent(
            self.config,
            num_ranks=num_ranks,
            environment=self._rank_environment,
            stop=self._stop_ranks,
            started=self._on_start,
            failed=lambda: self.watch is not None and self.watch.failed.is_set(),
            follower=self.follower,
        )
        self.events.write("start", num_ranks=num_ranks, num_references=self.config.sidecars.count)
        result = elastic.run(self.agent, self.config.event_log_handler)
        if result is None or not result.is_failed():
            return self._outcome(SUCCEEDED, 0)
        if not self.failures:
            self._gather_failures()
        code = self.failures[0].exit_status() if self.failures else 1
        return self._outcome(FAILED, code, message="" if self.failures else "the worker group failed")

    def _outcome(self, status: str, code: int, *, signal_name: str | None = None, message: str = "") -> Outcome:
        return Outcome(
            status=status,
            exit_code=code,
            seconds=round(time.monotonic() - self.begun_s, 3),
            restarts=self.attempt,
            signal=signal_name,
            failures=self.failures if status == FAILED else (),
            sidecars=self.keeper.summary(),
            message=message or (f"ended by {signal_name}" if signal_name else ""),
        )

    # What the agent calls.

    def _rank_environment(self, local_rank: int, its: Mapping[str, str]) -> Mapping[str, str]:
        """Added to what torch sets for one rank, just before it starts."""
        return {
            **self.config.ranks.environment,
            **self._common_environment(),
            names.ERROR_FILE: str(self.runtime.error(local_rank, int(its["TORCHELASTIC_RESTART_COUNT"]))),
        }

    def _common_environment(self) -> dict[str, str]:
        return {
            names.LAUNCH_ID: self.launch_id,
            names.RUN_DIR: str(self.config.run_dir.resolve()),
            names.RUNTIME_DIR: str(self.runtime.root),
            names.REFERENCE_DIR: str(self.runtime.reference),
            names.NUM_REFERENCES: str(self.config.sidecars.count),
        }

    def _sidecar_environment(self) -> dict[str, str]:
        return {**self.config.sidecars.environment, **self._common_environment()}

    def _on_start(self, attempt: int, pids: dict[int, int], group: WorkerGroup) -> None:
        from launcher.endings import EndingWatch

        for pid in pids.values():
            self.reaper.watch(pid)
        self.attempt, self.ended_by_us_s = attempt, None
        self.global_ranks = {worker.local_rank: worker.global_rank for worker in group.workers}
        self.failures = ()
        self.watch = EndingWatch(pids)
        self.desk.install()
        self.events.write("ranks_start", attempt=attempt, pids=pids, ranks=self.global_ranks)
        self.keeper.start()

    def _stop_ranks(self, signum: signal.Signals) -> None:
        """End the ranks of this start and all they started; side-cars stay."""
        if self.watch is None:
            return
        watch, roots = self.watch, [pid for _, pid in self.watch.children()]
        self.ended_by_us_s = self.ended_by_us_s or time.monotonic()

        def find() -> set[int]:
            keep = process_tree.members("", self.keeper.pids())
            return process_tree.members(self.marker, roots, exclude={*keep, self.reaper.pid})

        polite = watch.running()
        left = process_tree.terminate(
            find,
            polite=polite,
            signum=signum,
            grace_s=self.config.shutdown_timeout_s,
            hurry=self.desk.hurry,
            between=self._reap_adopted,
        )
        if left:
            logger.warning("processes %s cannot be ended: most likely they wait for a device", sorted(left))
        watch.settle()
        self._gather_failures()
        self.watch = None
        watch.close()

    def _gather_failures(self) -> None:
        if self.watch is None or self.agent is None:
            return
        from launcher import elastic

        agent = self.agent
        self.failures = first_failure.gather(
            self.watch.endings,
            begun_s=self.begun_s,
            ended_by_us_s=self.ended_by_us_s,
            rank_of=lambda local_rank: self.global_ranks.get(local_rank, local_rank),
            error_of=lambda local_rank: self.runtime.error(local_rank, self.attempt),
            torch_error_of=lambda local_rank: elastic.error_path(agent, local_rank),
            stderr_of=lambda local_rank: elastic.log_paths(agent, local_rank)[1],
        )
        for failure in self.failures:
            fields = dict(vars(failure))
            self.events.write("rank_failure", child_pid=fields.pop("pid"), failed_host=fields.pop("host"), **fields)

    def _reap_adopted(self) -> None:
        """Collect orphans of ranks: as their subreaper we are their parent now, and nobody else waits for them."""
        known = {self.reaper.pid, *self.keeper.pids()}
        if self.watch is not None:
            known |= {pid for _, pid in self.watch.children()}
        me = os.getpid()
        for pid in process_tree.pids():
            found = process_tree.stat(pid)
            if found and found.state == "Z" and found.parent == me and pid not in known:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass

    # The end.

    def _end_everything(self) -> None:
        self.keeper.stop_watching()
        if self.watch is not None:
            self._stop_ranks(signal.SIGTERM)
        sidecars = self.keeper.pids()
        process_tree.terminate(
            lambda: process_tree.members(self.marker, sidecars, exclude={self.reaper.pid}),
            polite=sidecars,
            signum=signal.SIGTERM,
            grace_s=min(5.0, self.config.shutdown_timeout_s),
            hurry=self.desk.hurry,
            between=self._reap_adopted,
        )
        self.keeper.reap()
        self.follower.stop()
        shutil.rmtree(self.runtime.root, ignore_errors=True)

    def _last_resort(self, signum: signal.Signals) -> None:
        """From the signal thread: the main thread is stuck where no signal handler runs. End it all and go."""
        self.keeper.stop_watching()
        process_tree.terminate(
            lambda: process_tree.members(self.marker, self.keeper.pids(), exclude={self.reaper.pid}),
            polite=(),
            signum=signal.SIGKILL,
            grace_s=0,
        )
        shutil.rmtree(self.runtime.root, ignore_errors=True)
        self.finish(
            self._outcome(SIGNALLED, 128 + signum, signal_name=signum.name, message="ended without the main thread")
        )
        self.reaper.dismiss()
        os._exit(128 + signum)


def become_subreaper() -> None:
    """Have orphaned grandchildren handed to this process instead of to init, so that they are found and collected."""
    import ctypes

    pr_set_child_subreaper = 36
    try:
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    except (OSError, AttributeError):
        logger.debug("no prctl: orphans are found by their environment alone")
