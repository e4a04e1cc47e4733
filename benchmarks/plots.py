"""Two pictures of `benchmarks.time_to_accuracy`: quality over time, and what was frozen when.

    python -m benchmarks.plots [RESULTS_FOLDER]

Reads `time_to_accuracy.json` in the folder (default `benchmarks/results`) and writes `quality_over_time.png` and
`freeze_timeline.png` beside it. Needs matplotlib, the extra `plot`; it is imported only here and only when drawing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy_summary import by_policy
from benchmarks.harness import RESULTS

SOURCE = "time_to_accuracy.json"
LABELS = {"none": "plain DDP"}


def timeline(run: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Share of training and share of blocks frozen from there on: corners of a staircase, from 0 to 1."""
    at, frozen = [0.0], [0.0]
    for entry in run["freezes"]:
        at.append(entry["step"] / run["steps"])
        frozen.append(entry["frontier"] / run["num_blocks"])
    return [*at, 1.0], [*frozen, frozen[-1]]


def draw(runs: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Both pictures from compared runs (`benchmarks.accuracy_summary.compared`); returns the files.

    Raises:
        SystemExit: matplotlib is not installed, or there is nothing to draw.
    """
    if not runs:
        raise SystemExit("no run is finished yet: there is nothing to draw")
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'kgtrun[plot]' (scripts/setup installs it)") from None
    matplotlib.use("agg")
    return [_quality_over_time(runs, folder), _freeze_timeline(runs, folder)]


def _quality_over_time(runs: Sequence[dict[str, Any]], folder: Path) -> Path:
    def panel(axes: Any, color: str, run: dict[str, Any], label: str | None) -> None:
        course = run["course"]
        minutes = [seconds / 60 for seconds in course["seconds"]]
        axes.plot(minutes, course["quality"], color=color, marker=".", linewidth=1, alpha=0.8, label=label)
        axes.set_xlabel("minutes of training, without validation")
        axes.set_ylabel("accuracy in percent, after each epoch")

    return _panels(runs, panel, folder / "quality_over_time.png")


def _freeze_timeline(runs: Sequence[dict[str, Any]], folder: Path) -> Path:
    def panel(axes: Any, color: str, run: dict[str, Any], label: str | None) -> None:
        axes.step(*timeline(run), where="post", color=color, linewidth=1.2, alpha=0.8, label=label)
        axes.set_xlabel("share of training")
        axes.set_ylabel("share of blocks frozen")
        axes.set_ylim(-0.02, 1.02)

    return _panels(runs, panel, folder / "freeze_timeline.png")


def _panels(runs: Sequence[dict[str, Any]], panel: Any, path: Path) -> Path:
    """One panel a workload, one colour a policy, one line a seed."""
    from matplotlib import pyplot

    groups = by_policy(runs)
    workloads = list(dict.fromkeys(workload for workload, _ in groups))
    policies = list(dict.fromkeys(policy for _, policy in groups))
    figure, grid = pyplot.subplots(1, len(workloads), figsize=(6.0 * len(workloads), 4.2), squeeze=False)
    for axes, workload in zip(grid[0], workloads, strict=True):
        for index, policy in enumerate(policies):
            for number, run in enumerate(groups.get((workload, policy), [])):
                panel(axes, f"C{index % 10}", run, LABELS.get(policy, policy) if number == 0 else None)
        axes.set_title(workload)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise SystemExit("usage: python -m benchmarks.plots [RESULTS_FOLDER]")
    folder = Path(arguments[0]) if arguments else RESULTS
    source = folder / SOURCE
    if not source.is_file():
        raise SystemExit(f"there is no {source}: python -m benchmarks.time_to_accuracy writes it")
    for path in draw(json.loads(source.read_text())["conditions"]["runs"], folder):
        print(path)


if __name__ == "__main__":
    main()
