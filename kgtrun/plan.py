"""From a command line and the environment to what is to be started, as plain data.

Pure but for reading the environment given to it: nothing is created or started. `describe` turns a plan into what
`--dry-run` prints and plan.json holds.

Errors: `ValueError` with what would be valid.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import sys
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from kgtrun import from_slurm
from kgtrun.argv import Request
from kgtrun.contract import environment as names
from launcher.config import (
    BatchJob,
    LaunchConfig,
    LogSpec,
    RankSpec,
    RendezvousSpec,
    SidecarSpec,
    Streams,
    parse_signals,
    parse_streams,
)
from launcher.runtime_dir import shared_directory
from launcher.slurm import Place, read_place

DEFAULT_POLICY = "none"
POLICIES_WITH_REFERENCE = ("kgt", "kgt-paper")
REFERENCE_COMMAND = (sys.executable, "-m", "kgt_ddp.reference.worker")
BOOT = str(Path(__file__).with_name("boot.py"))


def policy_name(spec: str) -> str:
    """`linear` of `linear:start=0.25,stop=0.75`."""
    return spec.partition(":")[0]


def check_policy(spec: str) -> None:
    """Refuse here, before anything starts, what every rank would refuse after minutes of start-up.

    Whether the job's length is missing is not known here: a script may pass `total_steps` itself.

    Raises:
        ValueError: unknown policy or option.
    """
    from kgt_ddp.policy_spec import parse_policy

    parse_policy(spec)


def number(request: Request, name: str, kind: type = int) -> Any:
    """A numeric option, None when it has no value."""
    text = request.text(name)
    if not text:
        return None
    return _number(f"--{name.replace('_', '-')}", text, kind)


def log_directory(base: Path, job: RendezvousSpec, restarts: int = 0) -> Path:
    """Base of this launcher's log files. Nodes may share it over a network, and count their local ranks alike: in a job
    of several nodes each launcher has a directory of its own. So has a job that was requeued (`restarts` times), and a
    run in a directory that has logs: torch would delete them."""
    alone = job.max_nodes == 1 and not restarts and not (base / "attempt_0").exists()
    return base if alone else base / f"{socket.gethostname()}-{os.getpid()}"


def byte_count(text: str) -> int:
    """`500M`, `20G` or plain bytes."""
    factor = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal():
        raise ValueError(f"--cache-bytes is {text!r}: use bytes, or a number with K, M, G or T")
    return int(digits) * factor


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words; a doubled comma is a comma."""
    return tuple(w.replace("\0", ",") for w in text.replace(",,", "\0").split(",") if w)


def nodes(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not low.isdecimal() or not (high or low).isdecimal():
        raise ValueError(f"--nnodes is {text!r}: use N or MIN:MAX")
    return int(low), int(high or low)


def rendezvous(request: Request) -> RendezvousSpec:
    """As torchrun decides: one node without an endpoint meets on a free local port."""
    low, high = nodes(request.text("nnodes"))
    backend, endpoint = request.text("rdzv_backend"), request.text("rdzv_endpoint")
    run_id = request.text("rdzv_id")
    port = number(request, "master_port")
    local = request.flag("standalone") or (backend == "static" and not endpoint and port is None and high == 1)
    if local:
        backend, endpoint, run_id = "c10d", "localhost:0", str(uuid.uuid4())
    elif backend == "static" and not endpoint:
        endpoint = f"{request.text('master_addr')}:{29500 if port is None else port}"
    settings = {}
    for item in filter(None, request.text("rdzv_conf").split(",")):
        key, found, value = item.partition("=")
        if not found:
            raise ValueError(f"--rdzv-conf holds {item!r}: use KEY=VALUE,KEY=VALUE")
        settings[key.strip()] = value.strip()
    return RendezvousSpec(
        min_nodes=low,
        max_nodes=high,
        backend=backend,
        endpoint=endpoint,
        run_id=run_id,
        settings=settings,
        local_addr=request.text("local_addr") or None,
        node_rank=number(request, "node_rank"),
    )


def tee(request: Request) -> Streams | None:
    """As asked for; what was redirected, and nothing said of tee, stays out of the console as with torchrun."""
    if "redirects" in request.given and "tee" not in request.given:
        return None
    return parse_streams(request.text("tee"))


def command(request: Request, environ: Mapping[str, str]) -> tuple[str, ...]:
    """What each rank runs: the boot step and the script, or the bare program for --no-python."""
    if not request.script:
        raise ValueError("no training script given: kgtrun [options] train.py [its arguments]")
    script = request.script[0]
    if request.flag("run_path"):
        if not os.path.isabs(script):
            raise ValueError(f"--run-path needs an absolute path, not {script!r}")
        mode = "path"
    elif request.flag("no_python"):
        if request.flag("module"):
            raise ValueError("--no-python and --module exclude each other")
        return request.script
    else:
        mode = "module" if request.flag("module") else "script"
    return (environ.get("PYTHON_EXEC", sys.executable), "-u", BOOT, mode, *request.script)


def trainer_environment(request: Request, policy: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What trainers and references are told, by the names of the contract."""
    drop_in = not request.flag("no_drop_in") and names.flag(names.DROP_IN, default=True, environ=environ)
    found = {names.POLICY: policy, names.DROP_IN: "1" if drop_in else "0"}
    for name, dest in (
        (names.TOTAL_STEPS, "total_steps"),
        (names.REFERENCE_PRECISION, "ref_precision"),
        (names.CACHE, "cache"),
        (names.CACHE_DIR, "cache_dir"),
    ):
        if request.text(dest):
            found[name] = request.text(dest)
    number(request, "total_steps")
    if request.text("cache_bytes"):
        found[names.CACHE_BYTES] = str(byte_count(request.text("cache_bytes")))
    for name, dest in ((names.OFF, "off"), (names.DETERMINISTIC, "deterministic")):
        if dest in request.given:
            found[name] = "1" if request.flag(dest) else "0"
    return found


def run_directory(
    request: Request,
    job: RendezvousSpec,
    place: Place | None,
    environ: Mapping[str, str],
    taken: Callable[[Path], bool] = Path.exists,
) -> Path:
    """--run-dir, or runs/ID of a named job (its nodes then share it), or runs/TIME-PID.

    A rank that starts a launch of its own hands down its launch's run directory, which is not for that one. A batch
    script may start several launches, one after the other or at once, and each has its own directory.
    """
    asked = request.text("run_dir")
    inherited = names.LAUNCH_ID in environ and asked == environ.get(names.RUN_DIR)
    if asked and not inherited:
        if place is None or place.step is not None or place.restarts or "run_dir" in request.given:
            return Path(asked)
        return Path(f"{asked}-{os.getpid()}" if taken(Path(asked)) else asked)
    if "rdzv_id" in request.given and job.run_id == request.text("rdzv_id"):
        return Path("runs") / job.run_id.replace("/", "_")
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def sidecars(count: int, environment: Mapping[str, str], place: Place | None) -> SidecarSpec:
    """References of this launcher; several launchers on one node share those of the first."""
    if place is None or not place.task_is_rank:
        return SidecarSpec(command=REFERENCE_COMMAND, count=count, environment=environment)
    return SidecarSpec(
        command=REFERENCE_COMMAND,
        count=0 if place.local_task else count,
        environment=environment,
        on_node=count,
        first_rank=place.local_task,
        directory=shared_directory(f"{place.name}-{place.restarts}-node{place.node}"),
    )


def make_plan(
    request: Request, environ: Mapping[str, str] | None = None, *, taken: Callable[[Path], bool] = Path.exists
) -> LaunchConfig:
    """The whole launch. `taken`: whether a directory is another launch's; it may be made ours by the question.

    Raises:
        ValueError: an option has no usable value, or two exclude each other.
    """
    environ = os.environ if environ is None else environ
    place = None if request.flag("no_slurm") else read_place(environ)
    if place is not None:
        request = from_slurm.fill(request, place)
    policy = request.text("policy") or DEFAULT_POLICY
    check_policy(policy)
    job = rendezvous(request)
    run_dir = run_directory(request, job, place, environ, taken)
    environment = trainer_environment(request, policy, environ)
    references = number(request, "ref_per_node")
    if references is None:
        needs = policy_name(policy) in POLICIES_WITH_REFERENCE and not request.flag("off")
        references = 1 if needs else 0
    timeout = request.text("shutdown_timeout") or environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    only = request.text("local_ranks_filter")
    if only and not all(part.strip().isdecimal() for part in only.split(",")):
        raise ValueError(f"--local-ranks-filter is {only!r}: use local ranks, as 0,1,12")
    return LaunchConfig(
        ranks=RankSpec(
            command=command(request, environ),
            count=request.text("nproc_per_node"),
            role=request.text("role"),
            environment={**environment, **(from_slurm.of_rank(place) if place else {})},
            numa_binding=request.text("numa_binding") or None,
            virtual_local_rank=request.flag("virtual_local_rank"),
        ),
        rendezvous=job,
        logs=LogSpec(
            directory=log_directory(
                Path(request.text("log_dir") or run_dir / "logs"), job, place.restarts if place else 0
            ),
            redirects=parse_streams(request.text("redirects")),
            tee=tee(request),
            only_ranks=frozenset(int(part) for part in only.split(",")) if only else frozenset(),
            stdout_filters=words(request.text("duplicate_stdout_filters")),
            stderr_filters=words(request.text("duplicate_stderr_filters")),
            prefix=request.text("log_prefix") or None,
            specs_plugin=request.text("logs_specs") or None,
        ),
        sidecars=sidecars(references, environment, place),
        run_dir=run_dir,
        max_restarts=number(request, "max_restarts"),
        monitor_interval_s=number(request, "monitor_interval", float),
        shutdown_timeout_s=_number("--shutdown-timeout", timeout, float),
        stop_signals=parse_signals(request.text("signals_to_handle")),
        event_log_handler=request.text("event_log_handler"),
        share_cores=not request.flag("no_core_sharing"),
        hang_timeout_s=number(request, "hang_timeout", float) or 0.0,
        stop_when_hung=request.text("hang_action") == "stop",
        peer_timeout_s=number(request, "peer_timeout", float) or 0.0,
        granted_cores=place.cores if place else None,
        batch=_batch_job(place) if place and request.text("requeue") == "auto" else None,
    )


def _batch_job(place: Place) -> BatchJob:
    """As Slurm's commands name it. One task of an array has the number of the whole array, too: by that all its tasks
    would be requeued."""
    return BatchJob(job=place.array or place.job, leader=place.task == 0)


def _number(flag: str, text: str, kind: type) -> Any:
    try:
        found = kind(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{flag} is {text!r}: {wanted} is needed")
    return found


def describe(plan: LaunchConfig) -> dict[str, Any]:
    """The plan as JSON-able data."""

    def plain(value: Any) -> Any:
        if isinstance(value, (Path, frozenset)):
            return str(value) if isinstance(value, Path) else sorted(value)
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [getattr(v, "name", plain(v)) for v in value]
        return value

    return plain(dataclasses.asdict(plan))
