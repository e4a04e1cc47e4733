"""What the launcher is asked to start, as plain frozen data.

Built by `kgtrun.plan`, read by the rest of this package. Classes check themselves on construction and raise
`ValueError` with what would be valid; they hold no behaviour and import no torch.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NO_STREAM, STDOUT, STDERR, BOTH = 0, 1, 2, 3

Streams = int | Mapping[int, int]
"""Which standard streams: 0 none, 1 stdout, 2 stderr, 3 both; or that by local rank."""


def parse_streams(text: str) -> Streams:
    """Read torchrun's stream notation, `3` or `0:3,12:1`, for local ranks of any number of digits.

    Raises:
        ValueError: anything else.
    """
    wanted = f"{text!r} names no streams: use 0 (none), 1 (stdout), 2 (stderr), 3 (both), or by local rank 0:3,12:1"
    if text in ("0", "1", "2", "3"):
        return int(text)
    by_rank: dict[int, int] = {}
    for item in text.split(","):
        rank, _, streams = item.partition(":")
        if not rank.strip().isdecimal() or streams.strip() not in ("0", "1", "2", "3"):
            raise ValueError(wanted)
        by_rank[int(rank)] = int(streams)
    return by_rank


def parse_signals(text: str) -> tuple[signal.Signals, ...]:
    """Read a comma-separated list of signal names, with or without SIG.

    Raises:
        ValueError: a name is unknown, or the signal cannot be handled.
    """
    found = []
    for item in filter(None, (part.strip().upper() for part in text.split(","))):
        name = item if item.startswith("SIG") else f"SIG{item}"
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(f"{item!r} is not a signal that can be handled: use names such as SIGTERM,SIGINT,SIGUSR1")
        found.append(signal.Signals[name])
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """The trainer ranks of this node."""

    command: tuple[str, ...]
    """Program and arguments, the same for each rank."""
    count: str
    """How many: a number, or a word that needs torch to count (auto, cpu, gpu, xpu)."""
    role: str = "default"
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to what torch.distributed.elastic sets."""
    numa_binding: str | None = None
    virtual_local_rank: bool = False

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("no training script given")
        if self.count.lstrip("+-").isdecimal() and int(self.count) < 1:
            raise ValueError(f"--nproc-per-node is {self.count}: at least one rank is needed")


@dataclass(frozen=True, kw_only=True)
class RendezvousSpec:
    """How nodes find each other."""

    min_nodes: int = 1
    max_nodes: int = 1
    backend: str = "c10d"
    endpoint: str = "localhost:0"
    run_id: str = "none"
    settings: Mapping[str, str] = field(default_factory=dict)
    """Options of the backend, as in --rdzv-conf."""
    local_addr: str | None = None
    node_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_nodes <= self.max_nodes:
            raise ValueError(f"--nnodes is {self.min_nodes}:{self.max_nodes}: use N or MIN:MAX with 1 <= MIN <= MAX")


@dataclass(frozen=True, kw_only=True)
class LogSpec:
    """Where the output of ranks goes."""

    directory: Path
    """Base: attempt_K/LOCAL_RANK/{stdout,stderr}.log below it."""
    redirects: Streams = NO_STREAM
    tee: Streams | None = BOTH
    """None: all that is not redirected."""
    only_ranks: frozenset[int] = frozenset()
    """Local ranks shown on the console; empty means all."""
    stdout_filters: tuple[str, ...] = ()
    stderr_filters: tuple[str, ...] = ()
    prefix: str | None = None
    """Template of a console line's prefix (${host}, ${rank}, ${local_rank}, ${role_name}); None is `host:rank: `."""
    specs_plugin: str | None = None
    """Name of a `torchrun.logs_specs` entry point that replaces all of this."""


@dataclass(frozen=True, kw_only=True)
class SidecarSpec:
    """Helper processes of this node; what they do is none of the launcher's business."""

    command: tuple[str, ...] = ()
    count: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    index_variable: str = "KGTRUN_REFERENCE_INDEX"
    max_restarts: int = 5
    on_node: int | None = None
    """How many the node has where another launcher on it starts them; None: `count`."""
    first_rank: int = 0
    """Number on the node of this launcher's first rank, where another launcher's ranks come before it."""
    directory: Path | None = None
    """Where launchers of one node share them; None: in this launch's own runtime directory."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"--ref-per-node is {self.count}: use 0 or more")
        if self.count and not self.command:
            raise ValueError("side-car processes are asked for, but no command is given")


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """The batch job that this launch is a step of, as far as ending it is concerned."""

    job: str
    leader: bool
    """Exactly one launcher of the step: the one that asks for the job to be requeued."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """One launch on this node."""

    ranks: RankSpec
    rendezvous: RendezvousSpec
    logs: LogSpec
    sidecars: SidecarSpec
    run_dir: Path
    max_restarts: int = 0
    monitor_interval_s: float = 0.1
    shutdown_timeout_s: float = 30.0
    """Between the polite signal and KILL, on every path."""
    stop_signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    event_log_handler: str = "null"
    share_cores: bool = True
    """Give ranks and side-cars cores of their own and set OMP_NUM_THREADS where the user did not."""
    hang_timeout_s: float = 0.0
    """Report a rank without progress for this long; 0 never."""
    stop_when_hung: bool = False
    peer_timeout_s: float = 60.0
    """Without news from another node for this long the launch ends, or restarts without it; 0 waits for ever."""
    granted_cores: int | None = None
    """Logical cores that a scheduler grants this launcher, where it says so without enforcing it."""
    batch: BatchJob | None = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-restarts", self.max_restarts),
            ("--shutdown-timeout", self.shutdown_timeout_s),
            ("--hang-timeout", self.hang_timeout_s),
            ("--peer-timeout", self.peer_timeout_s),
        ):
            if value < 0:
                raise ValueError(f"{flag} is {value}: use 0 or more")
        if self.monitor_interval_s <= 0:
            raise ValueError(f"--monitor-interval is {self.monitor_interval_s}: use a number of seconds above 0")
