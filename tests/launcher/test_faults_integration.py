"""KILL, STOP and TERM of each kind of process at random moments: eight seeds here, more in scripts/soak."""

from __future__ import annotations

import pytest

from tests.launcher.faults import Case, run_light

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("seed", [0, 1, 3, 4, 5, 7, 10, 12])
def test_a_fault_ends_in_order(seed, tmp_path):
    run_light(Case.from_seed(seed), tmp_path)
