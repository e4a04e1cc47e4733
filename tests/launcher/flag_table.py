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
AFFINITY = "tests/launcher/test_affinity.py"
DOCTOR, FAULTS = "tests/kgtrun/test_doctor.py", "tests/launcher/test_faults_integration.py"
MEETS, SPEC = f"{OPTIONS}::test_two_nodes_meet", f"{ELASTIC}::test_the_workers_are_specified_as_asked_for"
LOGS = f"{OPTIONS}::test_log_directory_redirects_tee_and_filters"
TOLD = f"{PLAN}::test_trainers_are_told_by_the_names_of_the_contract"
DRY = f"{OPTIONS}::test_dry_run_starts_nothing_and_version_is_printed"
BARE = f"{BOOT}::test_no_python_and_run_path"
SPAWN, MEMORY = "tests/launcher/test_spawn_environment.py", "tests/launcher/test_memory_integration.py"
STEP, REQUEUE = "tests/launcher/test_slurm.py", "tests/launcher/test_requeue_integration.py"
SLURM, PEERS = "tests/kgtrun/test_from_slurm.py", "tests/launcher/test_peers.py"
REFERENCES = f"{PLAN}::test_references_are_started_when_asked_for"

TESTS: dict[str, str] = {
    "nnodes": MEETS,
    "nproc-per-node": f"{ELASTIC}::test_words_for_the_number_of_ranks",
    "rdzv-backend": MEETS,
    "rdzv-endpoint": MEETS,
    "rdzv-id": MEETS,
    "rdzv-conf": SPEC,
    "standalone": f"{PLAN}::test_standalone_meets_on_a_free_local_port_whatever_else_is_said",
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
    "duplicate-stderr-filters": LOGS,
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
    "no-core-sharing": f"{SPAWN}::test_without_sharing_torchruns_rule_holds",
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
    "tee": "default 3 instead of 0: files, and whole lines with a host:rank prefix, except what is redirected; any number of "
    "digits in a rank",
    "redirects": "any number of digits in a rank",
    "start-method": "accepted; ranks are programs, which torchrun spawns whatever this says, too",
    "run-path": "the boot step runs it, in a fresh interpreter; torchrun's multiprocessing child is not imitated",
    "log-dir": "attempt_K/RANK directly below it, without a random directory; default: the run directory",
    "signals-to-handle": "a second signal hurries; exit code 128+N; USR1 and USR2 reach ranks that handle them anyway",
    "shutdown-timeout": "honoured on every path, whole process trees included",
    "no-python": "no boot step: no drop-in, no traceback in the report unless the program uses @record",
    "max-restarts": "ranks meet at a new store at each start; torchrun's find old addresses in theirs",
    "numa-binding": "refused, instead of torch's traceback, without a GPU for each rank or without numactl",
    "logs-specs": "the plug-in replaces prefix and console as well",
}

GRACE = f"{LAUNCH}::test_the_grace_is_honoured"
COMPLAINTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "one rank dies, the others hang",
        "stopped within the grace, on all nodes",
        (
            f"{FAULTS}::test_a_fault_ends_in_order",
            f"{FAULTS}::test_a_fault_in_a_real_job_ends_in_order",
            f"{OPTIONS}::test_a_failing_rank_ends_the_other_node_too_and_both_name_it",
        ),
    ),
    (
        "processes left after a kill",
        "reaper, marker, sessions",
        (f"{LAUNCH}::test_nothing_survives_sigkill_of_the_launcher",),
    ),
    (
        "opaque ChildFailedError",
        "the boot step records the exception; the report has host, log and last lines, and what came first above the rest",
        (
            f"{LAUNCH}::test_an_uncaught_exception_is_shown_without_a_decorator_and_without_our_frames",
            f"{LAUNCH}::test_one_that_closes_its_connections_before_it_says_why_is_the_cause",
            f"{MEMORY}::test_a_rank_killed_for_want_of_memory_is_named_and_so_is_the_reason",
        ),
    ),
    (
        "exit code always 1",
        "that of the first failing rank; 128+N for signals, 2 for usage, 75 for requeued",
        (
            f"{LAUNCH}::test_the_first_failure_is_named_with_traceback_and_its_code_is_the_exit_code",
            f"{LAUNCH}::test_a_stop_signal_reaches_the_ranks_and_gives_the_code",
            f"{OPTIONS}::test_a_usage_error_is_two_and_names_the_nearest",
            f"{REQUEUE}::test_a_warned_job_is_requeued_once_when_all_ranks_have_saved",
        ),
    ),
    (
        "port collisions",
        "one node: a free port; Slurm: by job and step; otherwise `doctor` tells",
        (
            f"{PLAN}::test_one_node_meets_on_a_free_local_port",
            f"{STEP}::test_ports_do_not_collide_between_neighbouring_jobs_and_steps",
            f"{DOCTOR}::test_a_taken_port_is_a_problem",
        ),
    ),
    (
        "OMP_NUM_THREADS=1 by default",
        "cores are shared out, in one line; the user's own number stays",
        (
            f"{AFFINITY}::test_a_small_machine_is_not_pinned_but_threads_are_counted",
            f"{SPAWN}::test_the_users_number_of_threads_stays_and_it_is_said",
        ),
    ),
    (
        "logs without host, single-digit rank maps",
        "prefix host:rank, ranks of any number of digits",
        (
            f"{LAUNCH}::test_ranks_run_with_prefix_and_logs_and_the_run_directory_is_filled",
            f"{ELASTIC}::test_tee_redirect_and_filter_work_for_ranks_of_two_digits",
        ),
    ),
    (
        "SIGUSR1/TERM not passed on, no grace",
        "forwarded to those that handle it; TERM to all, with the grace",
        (
            f"{LAUNCH}::test_user_signals_reach_only_ranks_that_handle_them",
            f"{GRACE}_and_a_second_signal_hurries",
        ),
    ),
    (
        "Slurm misread",
        "read inside the step by `launcher.slurm`, host lists expanded by us; never a fall-back to one host; `--no-slurm` "
        "([clusters.md](clusters.md))",
        (
            f"{STEP}::test_what_cannot_be_known_fails_and_says_what_to_set",
            f"{STEP}::test_the_step_counts_and_not_its_job",
            f"{STEP}::test_gpus",
            "tests/launcher/test_hostlist.py::test_host_lists",
            f"{SLURM}::test_no_slurm_takes_nothing",
        ),
    ),
    (
        "a cut cable hangs a launcher for a quarter of an hour",
        "signs of life, and a time limit on every connection: `--peer-timeout`",
        (f"{PEERS}::test_a_node_that_falls_silent_is_lost_and_named",),
    ),
    (
        "hostname resolution, IB vs Ethernet name",
        "`--local-addr`; `kgtrun doctor` tells what a name leads to and which interface is chosen",
        (
            f"{DOCTOR}::test_traps_of_name_resolution",
            f"{DOCTOR}::test_an_interface_that_is_not_up_is_a_problem",
            MEETS,
        ),
    ),
    (
        "--shutdown-timeout ignored on worker failure",
        "one grace on every path",
        (f"{GRACE}_when_a_rank_fails",),
    ),
)
"""Complaint, what ours does, tests. Every row of torchrun's users that we know of, and one from our own clusters."""


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
    complaints = "".join(
        f"| {what} | {ours} | {', '.join(_link(test) for test in tests)} |\n" for what, ours, tests in COMPLAINTS
    )
    return {
        "torchrun": head.format("difference") + "\n".join(_row(o) for o in ALL if not o.ours) + "\n",
        "ours": head.format("meaning") + "\n".join(_row(o) for o in ALL if o.ours) + "\n",
        "complaints": "| complaint | ours | tests |\n|---|---|---|\n" + complaints,
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
