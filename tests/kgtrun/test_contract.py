from __future__ import annotations

import logging

import pytest

from kgtrun.contract import environment
from kgtrun.contract.events import EventWriter, read_events


def test_events_of_several_writers_are_merged_by_time_and_a_torn_line_is_skipped(tmp_path):
    for index in (1, 0):
        writer = EventWriter.for_process(tmp_path, role="trainer", index=index)
        writer.write("apply", frontier=index, score=float("nan"), scores=[1.0, float("inf")])
        writer.close()
    with open(tmp_path / "events" / "torn.jsonl", "w") as f:
        f.write('{"kind": "apply", "fron')
    records = list(read_events(tmp_path))
    assert [r["frontier"] for r in records] == [1, 0]
    assert records[0]["score"] is None
    assert records[0]["scores"] == [1.0, None]


def test_a_writer_without_a_run_directory_writes_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EventWriter.for_process(None, role="trainer", index=0).write("apply")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_once_and_never_raised(tmp_path, monkeypatch, caplog):
    writer = EventWriter.for_process(tmp_path, role="trainer", index=0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with caplog.at_level(logging.WARNING):
        writer.write("apply")
        writer.write("apply")
    assert caplog.text.count("No space left") == 1


def test_switches_and_numbers_in_the_environment_are_checked():
    assert environment.flag("X", environ={"X": "on"}) and not environment.flag("X", environ={"X": "0"})
    assert environment.flag("X", default=True, environ={})
    with pytest.raises(ValueError, match="X='maybe'.*1 or 0"):
        environment.flag("X", environ={"X": "maybe"})
    assert environment.integer("N", environ={}) is None
    with pytest.raises(ValueError, match="whole number"):
        environment.integer("N", environ={"N": "-3"})
