"""Every private name of torch that the launcher relies on, with its reason. Tested with torch 2.13.

`SimpleElasticAgent` declares `_start_workers`, `_monitor_workers`, `_shutdown` and `_stop_workers` abstract: they are
its extension points, underscore and all. The rest is listed here because it is not declared for others' use. A test
asserts that each name exists, so that a new torch release says what moved.
"""

from __future__ import annotations

from collections.abc import Callable

NAMES: dict[str, str] = {
    "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent._start_workers": "to learn the pids",
    "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent._monitor_workers": "first failure",
    "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent._shutdown": "whole trees, one grace",
    "torch.distributed.elastic.agent.server.api:SimpleElasticAgent._remaining_restarts": "only set in its __init__",
    "torch.distributed.elastic.multiprocessing.api:SubprocessContext._close": "closed with no grace left",
    "torch.distributed.elastic.multiprocessing.api:PContext.wait": "it reaps, and signals the other ranks by itself",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous:DynamicRendezvousHandler._shared_tcp_store_server": "one a start",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous:DynamicRendezvousHandler._bootstrap_store_info": "where it is",
    "torch.distributed.elastic.multiprocessing.api:DefaultLogsSpecs._make_log_dir": "log paths without a random part",
}
"""Name → what it is used for."""


def worker_context(agent):
    """The agent's process context, None before the first start: there is no public accessor."""
    return agent._pcontext


def hold_polls(context, until: Callable[[], bool]) -> None:
    """Answer the agent's polls of its processes with "all run" until `until` says so.

    Torch's poll reaps a rank that has failed, so that its code and its moment can no longer be seen by others, and then
    sends TERM to the rest with 30 s of grace: their ends would be all that is known of the failure.
    """
    poll = context.wait
    context.wait = lambda timeout=-1, period=1: poll(timeout, period) if until() else None


def restarts_left(agent) -> int:
    """Restarts that remain: the agent counts them down in a private attribute."""
    return agent._remaining_restarts


def forbid_restarts(agent) -> None:
    """No further start of the worker group, whatever the user granted: the counter is the agent's own."""
    agent._remaining_restarts = 0


def new_store_each_round(handler) -> None:
    """Let the ranks of each start meet at a new store.

    Torch means to (`distributed/rendezvous.py`: "a new TCPStore for every retry so no need to add prefix"), but the dynamic
    rendezvous of 2.13 keeps the agent's: ranks find the addresses of the start before in it, and gloo connects to those
    or waits for them. Under torchrun four of eleven restarts failed of it. The static rendezvous has but one store to offer.
    """
    if not hasattr(handler, "_shared_tcp_store_server"):
        return
    join = handler.next_rendezvous

    def join_anew():
        handler._shared_tcp_store_server = handler._bootstrap_store_info = None
        return join()

    handler.next_rendezvous = join_anew


def set_log_directory(specs, directory: str) -> None:
    """Fix the directory that DefaultLogsSpecs would otherwise make up: users must find their logs."""
    specs._run_log_dir = directory
