"""The options of `kgtrun`, in one table: torchrun's, then ours.

A row is plain data, so that the command line can be read, completed and documented without importing torch or click. A
test compares the first part with torchrun's own parser and pins the second, so that neither grows unnoticed. Every
torchrun option that reads `PET_NAME` there reads it here, too; ours read their variable of
`kgtrun.contract.environment`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kgtrun.contract import environment as names


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of the command line."""

    name: str
    """Long name without dashes."""
    help: str
    default: str | None = None
    """None where the absence means something."""
    short: str | None = None
    metavar: str = "TEXT"
    flag: bool = False
    """Takes no value."""
    choices: tuple[str, ...] = ()
    variable: str | None = None
    """Environment variable read when the option is not given."""
    ours: bool = False
    number: bool = False
    """An empty value is a mistake; so it is in torchrun's variables, which torchrun reads as given."""

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")


def _torchrun(name: str, help: str, *, pet: bool = True, **rest) -> Option:
    return Option(name=name, help=help, variable="PET_" + name.replace("-", "_").upper() if pet else None, **rest)


def _ours(name: str, help: str, *, variable: str | None = None, **rest) -> Option:
    return Option(name=name, help=help, variable=variable, ours=True, **rest)


TORCHRUN: tuple[Option, ...] = (
    _torchrun("nnodes", "Number of nodes, or MIN:MAX.", default="1:1", metavar="N|MIN:MAX", number=True),
    _torchrun(
        "nproc-per-node",
        "Ranks on this node: a number, auto, cpu, gpu or xpu.",
        default="1",
        metavar="N|WORD",
        number=True,
    ),
    _torchrun("rdzv-backend", "Rendezvous backend.", default="static", metavar="NAME"),
    _torchrun("rdzv-endpoint", "Rendezvous endpoint.", default="", metavar="HOST:PORT"),
    _torchrun("rdzv-id", "Name of the job in the rendezvous.", default="none", metavar="ID"),
    _torchrun("rdzv-conf", "More settings of the rendezvous.", default="", metavar="KEY=VALUE,..."),
    _torchrun("standalone", "One node, rendezvous on a free local port.", flag=True),
    _torchrun("max-restarts", "Restarts of the worker group before giving up.", default="0", metavar="N", number=True),
    _torchrun("monitor-interval", "Seconds between looks at the ranks.", default="0.1", metavar="SECONDS", number=True),
    _torchrun(
        "start-method",
        "Accepted as torchrun does; ranks are programs, which are always spawned.",
        default="spawn",
        choices=("spawn", "fork", "forkserver"),
    ),
    _torchrun("event-log-handler", "Registered handler of torchelastic's events.", default="null", metavar="NAME"),
    _torchrun("role", "Role of the ranks.", default="default", metavar="NAME"),
    _torchrun("module", "The script is a module, run as by python -m.", short="m", flag=True),
    _torchrun("no-python", "The script is a program, run without python (no boot step, no drop-in).", flag=True),
    _torchrun("run-path", "Run the script, an absolute path, by runpy.run_path.", flag=True),
    _torchrun("log-dir", "Directory of the ranks' logs (default: logs in the run directory).", metavar="DIR"),
    _torchrun(
        "redirects",
        "Streams to files only: 0 none, 1 stdout, 2 stderr, 3 both, or by local rank 0:3,12:1.",
        default="0",
        short="r",
        metavar="STREAMS",
    ),
    _torchrun(
        "tee",
        "Streams to files and, with a host:rank prefix, to the console. torchrun's default is 0: straight to the"
        " console, without file or prefix.",
        default="3",
        short="t",
        metavar="STREAMS",
    ),
    _torchrun("local-ranks-filter", "Local ranks shown on the console.", default="", metavar="RANK,..."),
    _torchrun(
        "duplicate-stdout-filters",
        "Copy tee'd stdout lines that hold any of these words to a file; ,, is a comma.",
        default="",
        metavar="WORD,...",
    ),
    _torchrun(
        "duplicate-stderr-filters",
        "Copy tee'd stderr lines that hold any of these words to a file; ,, is a comma.",
        default="",
        metavar="WORD,...",
    ),
    _torchrun("node-rank", "Rank of this node, for the static rendezvous.", default="0", metavar="N", number=True),
    _torchrun("master-addr", "Address of node 0, for the static rendezvous.", default="127.0.0.1", metavar="ADDR"),
    _torchrun(
        "master-port", "Port on node 0, for the static rendezvous (default: 29500).", metavar="PORT", number=True
    ),
    _torchrun("local-addr", "Address of this node, as others reach it.", metavar="ADDR"),
    _torchrun("logs-specs", "Entry point in torchrun.logs_specs that takes over logging.", pet=False, metavar="NAME"),
    _torchrun(
        "numa-binding",
        "Bind ranks to the cores near their GPU.",
        pet=False,
        choices=("node", "socket", "exclusive", "core-complex"),
    ),
    _torchrun(
        "signals-to-handle",
        "Signals that end the run: forwarded to the ranks, then the shutdown timeout.",
        default="SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        metavar="SIG,...",
    ),
    _torchrun(
        "shutdown-timeout",
        "Seconds between the polite signal and KILL, on every path (default: TORCH_ELASTIC_SHUTDOWN_TIMEOUT or 30).",
        metavar="SECONDS",
        number=True,
    ),
    _torchrun("virtual-local-rank", "LOCAL_RANK is 0 for all; each rank sees its own GPU only.", flag=True),
)

OURS: tuple[Option, ...] = (
    _ours(
        "policy",
        "Freezing policy: none, static, linear, gradnorm, kgt-paper, kgt or replay, with options as NAME:key=value"
        " (default: none).",
        variable=names.POLICY,
        metavar="SPEC",
    ),
    _ours(
        "total-steps",
        "Optimizer steps of the whole job, for policies that plan by progress.",
        variable=names.TOTAL_STEPS,
        metavar="N",
        number=True,
    ),
    _ours(
        "run-dir", "Directory of events, logs and result (default: runs/...).", variable=names.RUN_DIR, metavar="DIR"
    ),
    _ours("ref-per-node", "Reference processes a node (default: what the policy needs).", metavar="N", number=True),
    _ours(
        "ref-precision",
        "Precision of the reference model (default: auto, bf16 where the CPU computes it fast).",
        variable=names.REFERENCE_PRECISION,
        choices=("auto", "bf16", "fp32"),
    ),
    _ours(
        "deterministic",
        "Repeatable decisions: scores are used at a fixed lag.",
        variable=names.DETERMINISTIC,
        flag=True,
    ),
    _ours("off", "Freeze nothing: FreezeAwareDDP is plain DDP.", variable=names.OFF, flag=True),
    _ours("no-drop-in", "Leave torch's DistributedDataParallel as it is; so does KGTRUN_DROP_IN=0.", flag=True),
    _ours(
        "cache",
        "Keep the outputs of frozen blocks and skip their forward (default: off).",
        variable=names.CACHE,
        choices=("off", "auto", "on"),
    ),
    _ours("cache-dir", "Directory of the activation cache.", variable=names.CACHE_DIR, metavar="DIR"),
    _ours(
        "cache-bytes",
        "Byte budget of the activation cache on this node, as 500M or 20G.",
        variable=names.CACHE_BYTES,
        number=True,
    ),
    _ours("log-prefix", "Console prefix: ${host}, ${rank}, ${local_rank}, ${role_name}.", metavar="TEMPLATE"),
    _ours("no-core-sharing", "Set no core affinity and leave OMP_NUM_THREADS to torchrun's rule (1).", flag=True),
    _ours(
        "hang-timeout",
        "Report a rank that makes no progress for this long, with all stacks; 0 never.",
        default="600",
        metavar="SECONDS",
        number=True,
    ),
    _ours(
        "hang-action",
        "What then: report, or stop the ranks (restarts apply).",
        default="report",
        choices=("report", "stop"),
    ),
    _ours(
        "peer-timeout",
        "Give a node up after this long without news from it: restart without it where that is possible, or end; 0 never.",
        default="60",
        metavar="SECONDS",
        number=True,
    ),
    _ours("no-slurm", "Take nothing from Slurm's environment.", flag=True),
    _ours(
        "requeue",
        "In a Slurm job that was warned or is preempted: have it requeued once the ranks have ended, and exit 75.",
        default="auto",
        choices=("auto", "never"),
    ),
    _ours("dry-run", "Print what would be started, and start nothing.", flag=True),
    _ours("json", "With --dry-run: print JSON.", flag=True),
    _ours("version", "Print the version.", flag=True),
    _ours("help", "Print this.", short="h", flag=True),
)

ALL: tuple[Option, ...] = TORCHRUN + OURS
