from __future__ import annotations

import json
import platform

from benchmarks.machine import machine_facts


def test_facts_are_complete_and_json() -> None:
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["python"] == platform.python_version()
    assert facts["cpu"]


def test_facts_hold_no_path() -> None:
    facts = machine_facts()
    del facts["cpu"]
    assert "/" not in json.dumps(facts)
