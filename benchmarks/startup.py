"""What typing kgtrun instead of torchrun costs before the first line and after the last.

Two ranks run a script that imports nothing heavy, so that the launcher itself is what is timed:

    first_line_s, first_line_over_torchrun   from the start of the command to the script's first line on its output
    teardown_s, teardown_over_torchrun       from the script's last line to the end of the command
    help_s                                   kgtrun --help
    usage_error_s                            an unknown option, to the end with exit code 2
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Figures, interleave, parser, ratios

SCRIPT = "import os, time\nos.write(1, b'first\\n')\ntime.sleep(0.3)\nos.write(1, b'last %f\\n' % time.time())\n"
"""A line a write: two ranks share one pipe."""
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--log-dir", "{dir}/torchrun"],
    "kgtrun": ["-m", "kgtrun", "--tee", "0", "--run-dir", "{dir}/run"],
    "kgtrun_with_prefix": ["-m", "kgtrun", "--run-dir", "{dir}/run"],
}
_LIMIT_S = 60


def one_run(arguments: list[str], directory: Path) -> tuple[float, float]:
    """Seconds to the first line and from the last line to the end."""
    begun = time.time()
    process = subprocess.Popen(
        [sys.executable, *(a.format(dir=directory) for a in arguments), "--nproc-per-node", "2", "script.py"],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    first_s = time.time() - begun
    lasts = [float(line.split()[-1]) for line in process.stdout if "last" in line]
    process.wait(_LIMIT_S)
    return first_s, time.time() - max(lasts)


def quick_command(*arguments: str) -> float:
    """Seconds of a command that starts no rank."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kgtrun", *arguments], capture_output=True, timeout=_LIMIT_S)
    return time.perf_counter() - begun


def main() -> None:
    options = parser(__doc__).parse_args()
    rounds = 2 if options.quick else 20
    figures = Figures("startup")
    teardown: dict[str, list[float]] = {name: [] for name in LAUNCHERS}

    def case(name: str) -> Callable[[], float]:
        def run() -> float:
            with tempfile.TemporaryDirectory(prefix="kgtrun-startup-") as directory:
                Path(directory, "script.py").write_text(SCRIPT)
                first_s, teardown_s = one_run(LAUNCHERS[name], Path(directory))
            teardown[name].append(teardown_s)
            return first_s

        return run

    first = interleave({name: case(name) for name in LAUNCHERS}, rounds=rounds)
    last = {name: samples[-rounds:] for name, samples in teardown.items()}
    figures.sampled("first_line_over_torchrun", ratios(first["kgtrun"], first["torchrun"]))
    figures.sampled("first_line_with_prefix_over_torchrun", ratios(first["kgtrun_with_prefix"], first["torchrun"]))
    figures.sampled("first_line_s", first["kgtrun"])
    figures.sampled("torchrun_first_line_s", first["torchrun"])
    figures.sampled("teardown_s", last["kgtrun"])
    figures.sampled("torchrun_teardown_s", last["torchrun"])
    figures.sampled("teardown_over_torchrun", ratios(last["kgtrun"], last["torchrun"]))
    short = interleave(
        {
            "help": lambda: quick_command("--help"),
            "error": lambda: quick_command("--nproc-per-nod", "2", "--nope", "x"),
        },
        rounds=2 * rounds,
    )
    figures.sampled("help_s", short["help"])
    figures.sampled("usage_error_s", short["error"])
    figures.publish(quick=options.quick)


if __name__ == "__main__":
    main()
