from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import harness


def test_spread_of_known_numbers() -> None:
    s = harness.spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (s.median, s.q1, s.q3, s.low, s.high, s.count) == (3.0, 2.0, 4.0, 1.0, 5.0, 5)


def test_spread_of_one_sample_is_that_sample() -> None:
    s = harness.spread([7.0])
    assert (s.median, s.q1, s.q3, s.low, s.high, s.count) == (7.0, 7.0, 7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_spread_refuses_what_has_no_median(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="samples"):
        harness.spread(samples)


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is three times slower in the second round; pairs do not see it, a ratio of sorted values would.
    assert harness.ratios([2.0, 6.0, 4.0], [1.0, 3.0, 2.0]) == [2.0, 2.0, 2.0]


def test_ratios_of_different_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 rounds"):
        harness.ratios([1.0, 2.0, 3.0], [1.0, 2.0])


def test_every_case_takes_every_place() -> None:
    orders = [harness.order_of_round("abc", i) for i in range(3)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab"]
    assert {tuple(sorted(place)) for place in zip(*orders, strict=True)} == {("a", "b", "c")}


def test_interleave_runs_each_case_once_a_round_and_drops_the_warmup() -> None:
    calls: list[str] = []

    def case(name: str, cost: float):
        def run() -> float:
            calls.append(name)
            return cost + len(calls)

        return run

    samples = harness.interleave({"a": case("a", 0.0), "b": case("b", 100.0)}, rounds=3, warmup_rounds=1)
    assert len(calls) == 8
    assert [sorted(calls[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    assert all(value >= 102.0 for value in samples["b"])
    assert min(samples["a"]) > 2.0, "a sample of the warm-up was kept"


def test_seconds_measures_the_call() -> None:
    assert 0.0 <= harness.seconds(lambda: None) < 1.0


def test_quick_prints_figures_last_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = harness.Figures("probe")
    assert figures.sampled("ratio", [1.0, 3.0, 2.0]) == 2.0
    figures.exact("bytes", 105_040)
    print("progress")
    figures.publish(quick=True, results=tmp_path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"ratio": 2.0, "bytes": 105_040}
    assert list(tmp_path.iterdir()) == []


def test_full_run_writes_figures_spread_conditions_and_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = harness.Figures("probe")
    figures.sampled("ratio", [1.0, 3.0, 2.0])
    figures.fact("batch", 128)
    figures.publish(quick=False, results=tmp_path / "results")
    record = json.loads((tmp_path / "results" / "probe.json").read_text())
    assert record["figures"] == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["spread"]["ratio"] == {"median": 2.0, "q1": 1.5, "q3": 2.5, "low": 1.0, "high": 3.0, "count": 3}
    assert record["conditions"] == {"batch": 128}
    assert {"cpu", "cores", "torch", "torch_threads", "commit", "date", "load_before"} <= set(record["machine"])


def test_a_part_that_is_measured_anew_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    first = harness.Figures("name")
    first.sampled("old", [1.0, 2.0, 4.0])
    first.exact("counted", 7)
    first.fact("size", 3)
    first.publish(quick=False, results=tmp_path)
    before = json.loads((tmp_path / "name.json").read_text())
    second = harness.Figures("name")
    second.take_up(tmp_path)
    second.exact("counted", 8)
    second.publish(quick=False, results=tmp_path)
    after = json.loads((tmp_path / "name.json").read_text())
    assert after["figures"] == before["figures"] | {"counted": 8}
    assert (after["spread"], after["conditions"]) == (before["spread"], before["conditions"])
    harness.Figures("other").take_up(tmp_path)  # nothing there yet


def test_the_parser_takes_its_description_from_the_first_line() -> None:
    parser = harness.parser("What it measures.\n\nMore.")
    assert parser.description == "What it measures."
    assert parser.parse_args(["--quick"]).quick
