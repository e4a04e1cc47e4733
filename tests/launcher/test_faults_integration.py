"""KILL, STOP and TERM of each kind of process at random moments: a few seeds here, more in scripts/soak."""

from __future__ import annotations

import pytest

from tests.launcher.faults import Case, run_light, run_real

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("seed", [0, 1, 3, 4, 5, 7, 10, 12])
def test_a_fault_ends_in_order(seed, tmp_path):
    run_light(Case.from_seed(seed), tmp_path)


def test_a_fault_in_a_real_job_ends_in_order(tmp_path):
    """The launcher's side of it is the same; gloo and DataLoader tell of a peer's or a worker's death in their own way."""
    run_real(Case.from_seed(4), tmp_path)
