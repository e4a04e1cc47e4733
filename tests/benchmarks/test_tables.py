from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.harness import RESULTS

MACHINE = {
    **{"cpu": "a CPU", "cores": 2, "torch": "2.13.0", "commit": "abc", "date": "2026-01-02T03:04:05+00:00"},
    **{"load_before": 0.1, "load_after": 1.96},
}


def page(name: str) -> str:
    return f"before\n<!-- table: {name} -->\nold\n<!-- end: {name} -->\nafter\n"


def test_figures_come_with_their_spread_and_the_machine(tmp_path: Path) -> None:
    record = {
        "figures": {"ratio": 1.23456, "bytes": 100, "missed": None},
        "spread": {"ratio": {"q1": 1.1, "q3": 1.3, "count": 5}},
        "machine": MACHINE,
    }
    (tmp_path / "step.json").write_text(json.dumps(record))
    text = tables.rendered(page("step"), tmp_path)
    assert "old" not in text
    assert "| `ratio` | 1.235 | 1.1 to 1.3 | 5 |" in text
    assert "| `bytes` | 100 |  | counted |" in text
    assert "a CPU, 2 cores, torch 2.13.0, commit `abc`, 2026-01-02, load 0.1 before, 2.0 after." in text
    assert tables.rendered(text, tmp_path) == text


def test_policies_are_compared_and_a_missed_target_is_said(tmp_path: Path) -> None:
    rest = {"plain_quality": [91.0, 92.0], "frozen_fraction": 0.41, "overhead_fraction": 0.012}
    table = {
        "vision": {
            "none": {"time_to_target_ratio": 1.0, "final_quality": [91.0, 92.0], **rest},
            "kgt": {"time_to_target_ratio": 1.3333, "final_quality": [91.5, 92.0], **rest},
            "linear": {"time_to_target_ratio": None, "final_quality": [90.0, 91.0], **rest},
        }
    }
    (tmp_path / "summary.json").write_text(json.dumps(table))
    text = tables.rendered(page("summary"), tmp_path)
    assert "| vision | `kgt` | 1.33 | 91.75 (91.50, 92.00) | +0.25 | 41% | 1.2% |" in text
    assert "| vision | `linear` | not reached with every seed | 90.50 (90.00, 91.00) | -1.00 |" in text
    assert "| vision | plain DDP | 1.00 |" in text


def test_what_is_not_measured_says_so_and_how_to_measure_it(tmp_path: Path) -> None:
    text = tables.rendered(page("summary"), tmp_path)
    assert "Not measured yet" in text
    assert "python -m benchmarks.time_to_accuracy" in text


def test_the_page_shows_what_the_results_say() -> None:
    old = tables.PAGE.read_text()
    assert tables.rendered(old, RESULTS) == old, "python -m benchmarks.tables --write"


def test_every_results_file_has_a_table_and_every_table_a_benchmark() -> None:
    names = re.findall(r"<!-- table: (\S+) -->", tables.PAGE.read_text())
    assert {file.stem for file in RESULTS.glob("*.json")} <= {*names, "time_to_accuracy"}
    for name in names:
        assert (RESULTS.parent / f"{tables.MODULES.get(name, name)}.py").is_file()


def test_without_write_the_page_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "PAGE", tmp_path / "page.md")
    tables.PAGE.write_text(page("nothing"))
    assert tables.main([]) == 1
    assert "-old" in capsys.readouterr().out
    assert tables.PAGE.read_text() == page("nothing")
    assert tables.main(["--write"]) == 0
    assert tables.main([]) == 0
