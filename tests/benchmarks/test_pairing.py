from __future__ import annotations

import pytest

from benchmarks.pairing import summarise


def evaluation(signal: list[float | None], floor: list[float | None], scatter: list[list[float]]) -> dict:
    return {"signal": {"probe": signal}, "floor": {"probe": floor}, "exact": [1.0, 2.0, 4.0], "scatter": scatter}


def test_figures_of_the_later_half_by_hand() -> None:
    early = evaluation([9.0, 9.0, 9.0], [1.0, 1.0, 1.0], [[1.0] * 3] * 2)
    late = evaluation([2.0, 6.0, 40.0], [1.0, 2.0, 4.0], [[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])
    found = summarise([early, late])
    assert found["probe_snr"] == 3.0
    assert found["probe_front_snr"] == 2.5
    assert found["probe_seen"] == pytest.approx(2 / 3)
    assert found["probe_bf16_over_fp32"] == 3.0
    assert found["fresh_scatter"] == 0.0


def test_what_is_not_known_or_has_no_floor_does_not_count() -> None:
    one = evaluation([None, 6.0, 8.0], [1.0, 0.0, 4.0], [[1.0] * 3] * 2)
    assert summarise([one])["probe_snr"] == 2.0
