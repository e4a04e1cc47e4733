from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots


def run(policy: str, seed: int, freezes: list[dict[str, int]]) -> dict[str, Any]:
    return {
        **{"workload": "vision", "policy": policy, "seed": seed, "steps": 100, "freezes": freezes},
        "num_blocks": 10 if policy != "none" else None,
        "course": {"seconds": [60.0, 120.0], "quality": [80.0, 90.0 + seed]},
    }


RUNS = [run("none", 0, []), run("kgt", 0, [{"step": 50, "frontier": 4}, {"step": 75, "frontier": 2}])]


def test_the_timeline_is_a_staircase_over_the_whole_of_training() -> None:
    assert plots.timeline(RUNS[1]) == ([0.0, 0.5, 0.75, 1.0], [0.0, 0.4, 0.2, 0.2])
    assert plots.timeline(RUNS[0]) == ([0.0, 1.0], [0.0, 0.0])


def test_both_pictures_are_drawn_from_the_results_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / plots.SOURCE).write_text(json.dumps({"conditions": {"runs": RUNS}}))
    plots.main([str(tmp_path)])
    pictures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [picture.name for picture in pictures] == ["quality_over_time.png", "freeze_timeline.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"kgtrun\[plot\]"):
        plots.draw(RUNS, tmp_path)


def test_without_results_the_benchmark_that_makes_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"python -m benchmarks.time_to_accuracy"):
        plots.main([str(tmp_path)])
