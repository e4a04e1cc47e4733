from __future__ import annotations

import struct

from launcher.progress import Progress, ProgressMeter


def beat(path, step: int, second: float, frontier: int = 0, saved_s: float = 0.0) -> None:
    path.write_bytes(struct.pack("<QQqd", step, int(second * 1e9), frontier, saved_s))


def test_the_slowest_rank_counts_and_the_rate_is_smoothed(tmp_path):
    meter, paths = ProgressMeter(), [tmp_path / "a", tmp_path / "b"]
    assert meter.look(paths) is None
    beat(paths[0], 10, 1.0)
    assert meter.look(paths) is None
    beat(paths[1], 8, 1.0, frontier=2)
    assert meter.look(paths) == Progress(8, 0.0, 2, 0.0)
    beat(paths[1], 18, 2.0, frontier=2, saved_s=3.4)
    beat(paths[0], 30, 2.0)
    assert meter.look(paths) == Progress(18, 10.0, 2, 3.4)
    assert meter.look(paths).steps_per_s == 10.0
    beat(paths[1], 0, 3.0)  # a restart
    assert meter.look(paths).steps_per_s == 0.0


def test_words():
    assert Progress(1200, 35.21, 3, 12.4).words() == "step 1200 · 35.2 steps/s · 3 blocks frozen · 12 s saved"
    assert Progress(5, 1.0, 0, 0.0).words() == "step 5 · 1 steps/s"
