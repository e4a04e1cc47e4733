"""Generates the tables of docs/launcher.md: flag by flag against torchrun, and complaint by complaint.

    python -m tests.launcher.flag_table          print them
    python -m tests.launcher.flag_table --write  put them into docs/launcher.md

Each row names the test that covers it; `test_flag_table` asserts that every flag has one, that the tests exist and that
the document is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kgtrun.options import ALL, Option

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/launcher.md"
PLAN, ARGV, BOOT = "tests/kgtrun/test_plan.py", "tests/kgtrun/test_argv.py", "tests/kgtrun/test_boot.py"
ELASTIC, OPTIONS = "tests/launcher/test_elastic.py", "tests/launcher/test_options_integration.py"
LAUNCH, HANG = "tests/launcher/test_launch_integration.py", "tests/launcher/test_hang_integration.py"
FAILURES, AFFINITY = "tests/launcher/test_failures.py", "tests/launcher/test_affinity.py"
DOCTOR, FAULTS = "tests/kgtrun/test_doctor.py", "tests/launcher/test_faults_integration.py"
MEETS, SPEC = f"{OPTIONS}::test_two_nodes_meet", f"{ELASTIC}::test_the_workers_are_specified_as_asked_for"
LOGS = f"{OPTIONS}::test_log_directory_redirects_tee_and_filters"
TOLD = f"{PLAN}::test_trainers_are_told_by_the_names_of_the_contract"
DRY = f"{OPTIONS}::test_dry_run_starts_nothing_and_version_is_printed"
BARE = f"{BOOT}::test_no_python_and_run_path"
SLURM, PEERS = "tests/kgtrun/test_from_slurm.py", "tests/launcher/test_peers.py"
REFERENCES = f"{PLAN}::test_references_are_started_when_asked_for"

TESTS: dict[str, str] = {
    "nnodes": MEETS,
    "nproc-per-node": f"{ELASTIC}::test_words_for_the_number_of_ranks",
    "rdzv-backend": MEETS,
    "rdzv-endpoint": MEETS,
    "rdzv-id": MEETS,
    "rdzv-conf": SPEC,
    "standalone": f"{ARGV}::test_values_come_from_the_line_then_the_environment_then_the_default",
    "max-restarts": f"{LAUNCH}::test_max_restarts_recovers",
    "monitor-interval": SPEC,
    "start-method": f"{ARGV}::test_a_mistake_names_what_would_be_valid",
    "event-log-handler": SPEC,
    "role": SPEC,
    "module": f"{BOOT}::test_a_module_sees_what_python_shows_it",
    "no-python": BARE,
    "run-path": BARE,
    "log-dir": LOGS,
    "redirects": LOGS,
    "tee": f"{ELASTIC}::test_tee_redirect_and_filter_work_for_ranks_of_two_digits",
    "local-ranks-filter": LOGS,
    "duplicate-stdout-filters": LOGS,
    "duplicate-stderr-filters": f"{PLAN}::test_a_plan_is_json",
    "node-rank": MEETS,
    "master-addr": MEETS,
    "master-port": MEETS,
    "local-addr": MEETS,
    "logs-specs": f"{ELASTIC}::test_a_logs_plugin_takes_over_and_still_passes_the_environment",
    "numa-binding": "tests/launcher/test_numa_integration.py::"
    "test_ranks_are_on_the_node_of_their_gpu_and_our_sharing_stays_away",
    "signals-to-handle": f"{OPTIONS}::test_a_signal_named_to_be_handled_ends_the_run",
    "shutdown-timeout": f"{LAUNCH}::test_the_grace_is_honoured_and_a_second_signal_hurries",
    "virtual-local-rank": f"{OPTIONS}::test_virtual_local_rank",
    "policy": TOLD,
    "total-steps": TOLD,
    "run-dir": f"{LAUNCH}::test_ranks_run_with_prefix_and_logs_and_the_run_directory_is_filled",
    "ref-per-node": REFERENCES,
    "ref-precision": TOLD,
    "deterministic": TOLD,
    "off": TOLD,
    "no-drop-in": f"{PLAN}::test_our_switches",
    "cache": TOLD,
    "cache-dir": TOLD,
    "cache-bytes": TOLD,
    "log-prefix": f"{ELASTIC}::test_prefixes",
    "no-core-sharing": f"{PLAN}::test_our_switches",
    "hang-timeout": f"{HANG}::test_a_silent_rank_is_reported_with_the_stacks_of_all",
    "hang-action": f"{HANG}::test_a_hung_run_is_stopped_when_asked",
    "peer-timeout": f"{PEERS}::test_a_node_that_falls_silent_is_lost_and_named",
    "no-slurm": f"{SLURM}::test_no_slurm_takes_nothing",
    "requeue": f"{SLURM}::test_nothing_is_requeued_where_the_user_does_not_want_it",
    "dry-run": DRY,
    "json": DRY,
    "version": DRY,
    "help": f"{OPTIONS}::test_help_is_there_without_torch",
}

DIFFERENCES: dict[str, str] = {
    "tee": "default 3 instead of 0: files, and whole lines with a host:rank prefix; any number of digits in a rank",
    "redirects": "any number of digits in a rank",
    "start-method": "accepted; ranks are programs, which torchrun spawns whatever this says, too",
    "run-path": "the boot step runs it, in a fresh interpreter; torchrun's multiprocessing child is not imitated",
    "log-dir": "attempt_K/RANK directly below it, without a random directory; default: the run directory",
    "signals-to-handle": "a second signal hurries; exit code 128+N; USR1 and USR2 reach ranks that handle them anyway",
    "shutdown-timeout": "honoured on every path, whole process trees included",
    "no-python": "no boot step: no drop-in, no traceback in the report unless the program uses @record",
    "numa-binding": "refused, instead of torch's traceback, without a GPU for each rank or without numactl",
    "logs-specs": "the plug-in replaces prefix and console as well",
}

COMPLAINTS: tuple[tuple[str, str, str], ...] = (
    (
        "one rank dies, the others hang",
        f"{FAULTS}::test_a_fault_ends_in_order",
        "stopped within the grace, on all nodes",
    ),
    (
        "processes left after a kill",
        f"{LAUNCH}::test_nothing_survives_sigkill_of_the_launcher",
        "reaper, marker, sessions",
    ),
    (
        "opaque ChildFailedError",
        f"{LAUNCH}::test_an_uncaught_exception_is_shown_without_a_decorator_and_without_our_frames",
        "the boot step records the exception",
    ),
    (
        "exit code always 1",
        f"{LAUNCH}::test_the_first_failure_is_named_with_traceback_and_its_code_is_the_exit_code",
        "that of the first failing rank",
    ),
    (
        "port collisions",
        f"{PLAN}::test_one_node_meets_on_a_free_local_port",
        "one node: a free port; Slurm: by job and step; otherwise `doctor` tells",
    ),
    (
        "OMP_NUM_THREADS=1 by default",
        f"{AFFINITY}::test_a_small_machine_is_not_pinned_but_threads_are_counted",
        "cores are shared out, in one line",
    ),
    (
        "logs without host, single-digit rank maps",
        f"{ELASTIC}::test_tee_redirect_and_filter_work_for_ranks_of_two_digits",
        "prefix host:rank",
    ),
    (
        "SIGUSR1/TERM not passed on, no grace",
        f"{LAUNCH}::test_user_signals_reach_only_ranks_that_handle_them",
        "forwarded to those that handle it",
    ),
    (
        "Slurm misread",
        "tests/launcher/test_slurm.py::test_what_cannot_be_known_fails_and_says_what_to_set",
        "read inside the step by `launcher.slurm`; never a fall-back to one host ([clusters.md](clusters.md))",
    ),
    (
        "a cut cable hangs a launcher for a quarter of an hour",
        f"{PEERS}::test_a_node_that_falls_silent_is_lost_and_named",
        "signs of life, and a time limit on every connection: `--peer-timeout`",
    ),
    ("hostname resolution, IB vs Ethernet name", f"{DOCTOR}::test_traps_of_name_resolution", "`kgtrun doctor`"),
    (
        "--shutdown-timeout ignored on worker failure",
        f"{LAUNCH}::test_the_grace_is_honoured_and_a_second_signal_hurries",
        "one grace on every path",
    ),
)


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"`{name}` ([{Path(path).name}](../{path}))"


def _row(option: Option) -> str:
    names = f"`--{option.name}`" + (f" `-{option.short}`" if option.short else "")
    variable = f"`{option.variable}`" if option.variable else ""
    meaning = option.help if option.ours else DIFFERENCES.get(option.name, "as torchrun")
    return f"| {names} | {variable} | {meaning} | {_link(TESTS[option.name])} |"


def tables() -> dict[str, str]:
    """The generated parts by marker."""
    head = "| flag | variable | {} | test |\n|---|---|---|---|\n"
    complaints = "".join(f"| {what} | {ours} | {_link(test) if test else ''} |\n" for what, test, ours in COMPLAINTS)
    return {
        "torchrun": head.format("difference") + "\n".join(_row(o) for o in ALL if not o.ours) + "\n",
        "ours": head.format("meaning") + "\n".join(_row(o) for o in ALL if o.ours) + "\n",
        "complaints": "| complaint | ours | test |\n|---|---|---|\n" + complaints,
    }


def render(document: str) -> str:
    """The document with its generated parts replaced."""
    for marker, table in tables().items():
        begin, end = f"<!-- generated: {marker} -->\n", f"<!-- end: {marker} -->"
        before, _, rest = document.partition(begin)
        _, _, after = rest.partition(end)
        document = before + begin + table + end + after
    return document


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(render(DOCUMENT.read_text()))
    else:
        print("\n".join(tables().values()))
