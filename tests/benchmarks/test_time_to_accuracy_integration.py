"""Real jobs under torchrun and kgtrun, with references, in turns, on images made here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy
import pytest

from benchmarks.machine import ROOT
from benchmarks.process_cost import run_process

pytestmark = pytest.mark.integration


def write_images(folder: Path) -> None:
    """IDX files as of Fashion-MNIST; class c is a bright row at 2c."""
    rng = numpy.random.default_rng(0)
    for split, count in (("train", 256), ("t10k", 500)):
        labels = rng.integers(10, size=count, dtype=numpy.uint8)
        images = rng.integers(40, size=(count, 28, 28), dtype=numpy.uint8)
        images[numpy.arange(count), 2 * labels] = 240
        for name, values in (("labels-idx1", labels), ("images-idx3", images)):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (folder / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())


def test_compared_policies_hand_over_epoch_by_epoch(tmp_path: Path) -> None:
    write_images(tmp_path)
    env = {k: v for k, v in os.environ.items() if not k.startswith("KGTRUN_")}
    env["KGTRUN_FASHION_MNIST_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.time_to_accuracy", "--quick", "--policies", "none,kgt-paper"]
    log = tmp_path / "output.log"
    with log.open("w") as output:
        cost = run_process([*command, "--train-images", "256"], timeout_s=300, env=env, cwd=ROOT, output=output)
    text = log.read_text()
    assert (cost.exit_code, cost.num_outlived) == (0, 0), text
    *lines, last = text.splitlines()
    turns = [line.split()[:2] for line in lines if "  wall " in line]
    plain, ours = "vision-none-seed0", "vision-kgt-paper-seed0"
    assert turns == [
        *([plain, "start"], [ours, "start"], [ours, "0"], [plain, "0"]),
        *([plain, "1"], [ours, "1"], [ours, "exit"], [plain, "exit"]),
    ]
    figures = json.loads(last)
    assert figures["vision none time_to_target_ratio"] == 1.0
    assert 0 < figures["vision kgt-paper overhead_fraction"] < 1
