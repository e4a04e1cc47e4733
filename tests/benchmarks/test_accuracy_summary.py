from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy_summary import compare, compared, course, frozen_fraction, overhead_fraction, summary, time_to


def record(
    policy: str = "none",
    seed: int = 0,
    *,
    walls: tuple[float, ...] = (10.0, 100.0, 100.0, 100.0, 5.0),
    accuracies: tuple[float, ...] = (0.80, 0.90, 0.91),
    freezes: list[dict[str, int]] | None = None,
    reference_cpu_s: float = 0.0,
    heat: str = "a",
    first_loss: float = 0.1,
) -> dict[str, Any]:
    places = ["start", *map(str, range(len(accuracies))), "exit"]
    result: dict[str, Any] = {
        **{"steps": 300, "accuracy": accuracies[-1], "test_wall_s": 0.0, "test_cpu_s": 0.0},
        "epochs": [{"accuracy": a, "val_wall_s": 5.0, "val_cpu_s": 9.0, "loss": 0.1} for a in accuracies],
    }
    result["epochs"][0]["loss"] = first_loss
    if freezes is not None:
        result["freezing"] = {"num_blocks": 10, "freezes": freezes}
    return {
        **{"workload": "vision", "policy": policy, "seed": seed, "heat": heat, "commit": "abc", "result": result},
        "turns": [
            {"place": place, "wall_s": wall, "cpu_s": 2 * wall, "reference_cpu_s": reference_cpu_s}
            for place, wall in zip(places, walls, strict=True)
        ],
    }


def test_the_clock_holds_start_and_epochs_but_no_validation() -> None:
    found = course(record())
    assert found.seconds == [105.0, 200.0, 295.0]
    assert found.seconds_with_validation == [110.0, 210.0, 310.0]
    assert found.cpu_s == [20.0 + 191.0, 20.0 + 2 * 191.0, 20.0 + 3 * 191.0]
    assert found.quality == pytest.approx([80.0, 90.0, 91.0])


def test_the_final_test_is_not_in_the_clock_and_its_quality_is_the_final_one() -> None:
    tested = record()
    tested["result"] |= {"test_wall_s": 20.0, "test_cpu_s": 30.0, "accuracy": 0.89}
    found = course(tested)
    assert found.seconds == [105.0, 200.0, 275.0]
    assert found.cpu_s[-1] == 20.0 + 3 * 191.0 - 30.0
    assert found.quality[-1] == pytest.approx(89.0), "of the last epoch the whole test set counts"
    compared_with_itself = compare(tested, tested)
    assert compared_with_itself["final_quality"] == pytest.approx(89.0)
    assert compared_with_itself["target"] == pytest.approx(88.7)


def test_turns_that_do_not_fit_the_epochs_are_refused() -> None:
    broken = record()
    broken["turns"].pop(2)
    with pytest.raises(ValueError, match="3 epochs, but the turns were start, 0, 2, exit"):
        course(broken)


def test_the_target_is_reached_at_the_end_of_the_first_epoch_that_is_as_good() -> None:
    seconds, quality = [1.0, 2.0, 3.0, 4.0], [50.0, 90.7, 90.2, 91.0]
    assert time_to(90.7, seconds, quality) == 2.0
    assert time_to(90.8, seconds, quality) == 4.0
    assert time_to(91.5, seconds, quality) is None
    assert time_to(91.0 - 0.3, seconds, [50.0, 90.7, 0.0, 0.0]) == 2.0, "binary fractions do not decide"


def test_blocks_count_as_frozen_until_they_thaw() -> None:
    freezes = [{"step": 100, "frontier": 6}, {"step": 200, "frontier": 2}]
    assert frozen_fraction(record(freezes=freezes)) == pytest.approx((6 * 100 + 2 * 100) / 3000)
    assert frozen_fraction(record(freezes=[])) == 0.0
    assert frozen_fraction(record()) == 0.0


def test_overhead_is_the_share_of_reference_cpu_seconds() -> None:
    assert overhead_fraction(record(reference_cpu_s=6.3)) == pytest.approx(5 * 6.3 / 630)


def test_a_run_is_compared_with_plain_of_its_seed() -> None:
    plain = record()
    faster = record("kgt", walls=(10.0, 100.0, 60.0, 50.0, 5.0), accuracies=(0.8, 0.905, 0.908), heat="b")
    found = compare(faster, plain)
    assert found["target"] == pytest.approx(90.7)
    assert found["seconds_to_target"] == 205.0
    assert found["time_to_target_ratio"] == pytest.approx(295 / 205)
    assert found["time_to_target_ratio_with_validation"] == pytest.approx(310 / 220)
    assert found["whole_job_ratio"] == pytest.approx(295 / 205)
    assert found["plain_clock"] == "other turns"
    assert compare(faster, plain | {"heat": "b"})["plain_clock"] == "same turns"


def test_the_clocks_of_a_plain_run_of_another_heat_go_by_the_pace_taken_in_this_one() -> None:
    plain = record(walls=(10.0, 100.0, 100.0, 400.0, 5.0))
    slower_machine = record("kgt", walls=(15.0, 150.0, 90.0, 75.0, 7.0), heat="b") | {
        "pace": [
            {"place": "start", "wall_s": 99.0, "cpu_s": 99.0},
            {"place": "0", "wall_s": 140.0, "cpu_s": 210.0},
            {"place": "1", "wall_s": 160.0, "cpu_s": 190.0},
        ]
    }
    found = compare(slower_machine, plain)
    assert found["plain_clock"] == "paced"
    whole = 10.0 + 100.0 + 100.0 + 400.0
    assert found["whole_job_ratio"] == pytest.approx(1.5 * (whole - 15.0) / (330.0 - 15.0))
    assert found["time_to_target_ratio_with_validation"] == pytest.approx(1.5 * whole / 330.0)
    assert found["cpu_to_target_ratio"] == pytest.approx(1.0 * (2 * whole - 27.0) / (2 * 330.0 - 27.0))
    assert found["plain_quality"] == pytest.approx(91.0)


def test_a_run_is_compared_with_a_plain_run_that_began_as_it_did_if_there_is_one() -> None:
    """The same seed trains another model where sums are rounded otherwise: on another CPU, whatever its instructions' name."""
    plain_there = record(heat="a", first_loss=0.5161)
    plain_here = record(accuracies=(0.8, 0.9, 0.92), heat="b", first_loss=0.5159)
    ours = record("kgt", heat="c", first_loss=0.5159)
    theirs = record("linear", heat="d", first_loss=0.5161)
    (_, alone) = compared([plain_there, ours])
    assert (alone["plain_quality"], alone["plain_model"]) == (pytest.approx(91.0), "another")
    plain, found, other = compared([plain_there, ours, theirs, plain_here])
    assert (found["plain_quality"], found["plain_model"]) == (pytest.approx(92.0), "same")
    assert (other["plain_quality"], other["plain_model"]) == (pytest.approx(91.0), "same")
    assert plain["policy"] == "none" and plain["final_quality"] == pytest.approx(92.0), "of two the last is listed"
    beside = record("gradnorm", heat="a", first_loss=0.7)  # it froze in its first epoch
    assert compared([plain_there, beside])[1]["plain_model"] == "same"


def test_a_run_is_compared_with_the_plain_run_that_took_its_turns_beside_it_else_with_the_last() -> None:
    before, after = record(heat="a"), record(accuracies=(0.8, 0.9, 0.92), heat="b")
    found = compared([before, after, record("kgt", heat="a"), record("linear", heat="b"), record("gradnorm", heat="c")])
    by_policy = {run["policy"]: (run["plain_quality"], run["plain_clock"]) for run in found}
    assert by_policy["kgt"] == (pytest.approx(91.0), "same turns")
    assert by_policy["linear"] == (pytest.approx(92.0), "same turns")
    assert by_policy["gradnorm"] == (pytest.approx(92.0), "other turns")


def test_the_summary_has_the_agreed_keys_and_no_ratio_where_a_seed_missed_the_target() -> None:
    good = {"walls": (10.0, 60.0, 60.0, 60.0, 5.0), "accuracies": (0.8, 0.9, 0.91)}
    runs = compared(
        [
            record(seed=0),
            record(seed=1),
            record("kgt", 0, **good),
            record("kgt", 1, **good),
            record("linear", 0, **good),
            record("linear", 1, accuracies=(0.5, 0.5, 0.5)),
            record("kgt", 2, **good),
        ]
    )
    table = summary(runs)
    assert list(table) == ["vision"]
    assert list(table["vision"]) == ["none", "kgt", "linear"]
    kgt = table["vision"]["kgt"]
    assert set(kgt) == {
        *("time_to_target_ratio", "final_quality", "plain_quality"),
        *("frozen_fraction", "overhead_fraction"),
    }
    assert kgt["time_to_target_ratio"] == pytest.approx(295 / 175)
    assert kgt["final_quality"] == pytest.approx([91.0, 91.0]), "seed 2 has no plain run and is left out"
    assert table["vision"]["linear"]["time_to_target_ratio"] is None
    assert table["vision"]["none"]["time_to_target_ratio"] == 1.0
