"""Real ranks for tests: `run_ranks(n, fn, *args)` runs `fn(rank, world, *args)` in n processes joined by gloo.

Processes come from a fork server that has torch imported already. Functions travel by value, so they may live in any test
module. Every run is bounded; what is left after the bound is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "kgt_ddp.ddp"])


class RanksFailed(AssertionError):
    """Some rank raised or died. `failures`: rank -> traceback, or how it died."""

    def __init__(self, failures: dict[int, str]) -> None:
        super().__init__("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items())))
        self.failures = failures


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 90, env: dict[str, str] | None = None
) -> list[Any]:
    """Results of all ranks, by rank.

    Raises:
        RanksFailed: a rank raised, died or did not end in time.
    """
    module = sys.modules[fn.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        payload = cloudpickle.dumps((fn, args))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main, args=(payload, rank, world, os.path.join(folder, "store"), theirs, env or {})
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        outcomes = _collect(pipes, time.monotonic() + timeout_s)
        for rank, process in enumerate(processes):
            process.join(5 if rank in outcomes else 0)
            if process.is_alive():
                process.kill()
                process.join()
            if outcomes.get(rank, (True,))[0] and (rank not in outcomes or process.exitcode != 0):
                outcomes[rank] = (False, f"no result; exit code {process.exitcode}")
    failures = {rank: text for rank, (ok, text) in outcomes.items() if not ok}
    if failures:
        raise RanksFailed(failures)
    return [outcomes[rank][1] for rank in range(world)]


def _collect(pipes: list[Connection], deadline: float) -> dict[int, tuple[bool, Any]]:
    outcomes: dict[int, tuple[bool, Any]] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            rank = waiting.pop(pipe)
            try:
                outcomes[rank] = cloudpickle.loads(pipe.recv_bytes())
            except EOFError:
                pass
            pipe.close()
    return outcomes


def _rank_main(payload: bytes, rank: int, world: int, store: str, pipe: Connection, env: dict[str, str]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(env, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
        )
        fn, args = cloudpickle.loads(payload)
        outcome = (True, fn(rank, world, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    pipe.send_bytes(cloudpickle.dumps(outcome))
    if outcome[0]:
        dist.destroy_process_group()
