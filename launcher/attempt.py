"""One start of the worker group on this node: its ranks, whether they move, how they ended.

States: running, then failed (a rank ended badly, or hangs and is to be stopped for it), then ended (`stop` has run: no
process of the attempt is left and `failures` is known). A restart is a new attempt.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from launcher import first_failure, process_tree
from launcher.config import LaunchConfig
from launcher.endings import Ending, EndingWatch
from launcher.memory import out_of_memory_kills
from launcher.outcome import Failure
from launcher.runtime_dir import RuntimeDir
from launcher.watchdog import Stall, Watchdog

logger = logging.getLogger(__name__)


class Attempt:
    """Watches the ranks of one start, given as local rank → pid."""

    def __init__(
        self,
        number: int,
        pids: Mapping[int, int],
        global_ranks: Mapping[int, int],
        *,
        config: LaunchConfig,
        runtime: RuntimeDir,
        begun_s: float,
        event: Callable[..., object],
    ) -> None:
        self.number, self.pids, self.global_ranks = number, dict(pids), dict(global_ranks)
        self.failures: tuple[Failure, ...] = ()
        self.hung = threading.Event()
        self._config, self._runtime, self._begun_s, self._event = config, runtime, begun_s, event
        self._kills_before = out_of_memory_kills()
        self._ended_by_us_s: float | None = None
        self._ended = False
        self._watch = EndingWatch(pids)
        self._watchdog: Watchdog | None = None
        if config.hang_timeout_s:
            self._watchdog = Watchdog(
                timeout_s=config.hang_timeout_s,
                pids={self.global_ranks[local_rank]: pid for local_rank, pid in pids.items()},
                beats={rank: runtime.heartbeat(local_rank) for local_rank, rank in self.global_ranks.items()},
                stacks={rank: runtime.stacks(local_rank) for local_rank, rank in self.global_ranks.items()},
                on_stall=self._on_stall,
            )

    def failed(self) -> bool:
        """Whether the ranks are to be ended."""
        if self._ended or not self._watch.failed.is_set():
            return not self._ended and self.hung.is_set()
        failed = [ending for ending in self._watch.endings if ending.returncode]
        if all(first_failure.is_reaction(its.returncode, self._error_of(its.key)) for its in failed):
            return self.hung.is_set() or not self.may_tell_more(failed[0].monotonic_s)
        return True

    def may_tell_more(self, since_s: float) -> bool:
        """Whether a rank that still runs may tell why others lost their connections, at `since_s`, monotonic time.

        It may have raised before, and be about to end; ended by us it could not say so any more.
        """
        patience_s = min(first_failure.HEAR_OUT_S, self._config.shutdown_timeout_s)
        if self._ended or time.monotonic() > since_s + patience_s:
            return False
        return not all(self._runtime.error(rank, self.number).exists() for rank in self.running_ranks())

    def _error_of(self, local_rank: int) -> dict[str, Any]:
        return first_failure.read_error(self._runtime.error(local_rank, self.number))

    def running(self) -> list[int]:
        """Pids of ranks that have not ended, as far as has been noted."""
        return [] if self._ended else self._watch.running()

    def running_ranks(self) -> list[int]:
        """Local ranks of `running`."""
        running = set(self.running())
        return [local_rank for local_rank, pid in self.pids.items() if pid in running]

    def codes(self) -> list[int]:
        """Exit codes of the ranks that have ended, negative for signals."""
        return self._watch.codes()

    def stop(
        self,
        signum: signal.Signals,
        *,
        find: Callable[[], set[int]],
        hurry: Callable[[], bool],
        between: Callable[[], object],
        stderr_of: Callable[[int], Path | None],
        torch_error_of: Callable[[int], Path | None],
        excused: Collection[int] = (),
    ) -> None:
        """End the ranks and all `find` returns, then gather what failed; `excused` exit codes are no failures. A second call
        does nothing."""
        if self._ended:
            return
        self._ended_by_us_s = time.monotonic()
        if self._watchdog is not None:
            self._watchdog.close()
        left = process_tree.terminate(
            find,
            polite=self._watch.running(),
            signum=signum,
            grace_s=self._config.shutdown_timeout_s,
            hurry=hurry,
            between=between,
        )
        if left:
            logger.warning("processes %s cannot be ended: most likely they wait for a device", sorted(left))
        self._watch.settle()
        self._ended = True
        self.failures = first_failure.gather(
            self._watch.endings,
            begun_s=self._begun_s,
            ended_by_us_s=self._ended_by_us_s,
            rank_of=lambda local_rank: self.global_ranks.get(local_rank, local_rank),
            error_of=lambda local_rank: self._runtime.error(local_rank, self.number),
            torch_error_of=torch_error_of,
            stderr_of=stderr_of,
            excused=excused,
            hint_of=self._hint,
        )
        self._watch.close()
        for failure in self.failures:
            fields = dict(vars(failure))
            self._event("rank_failure", child_pid=fields.pop("pid"), failed_host=fields.pop("host"), **fields)

    def _on_stall(self, stall: Stall) -> None:
        self._event("hang", silent=stall.silent, stopped=stall.stopped, steps=stall.steps, stacks=stall.stacks)
        logger.warning("%s: %s", socket.gethostname(), stall.report())
        if self._config.stop_when_hung:
            self.hung.set()

    def _hint(self, ending: Ending) -> str:
        """What else is known about an ending that was not our doing."""
        kills = out_of_memory_kills()
        if kills is None or self._kills_before is None or kills <= self._kills_before:
            return ""
        if ending.returncode == -signal.SIGKILL:
            return "killed by the kernel for want of memory (its oom_kill counter rose)"
        return "meanwhile the kernel killed a process for want of memory (its oom_kill counter rose)"
