from __future__ import annotations

import json

import pytest

from kgtrun.contract.events import EventWriter
from kgtrun.report import main, report


def recorded(root, *, freezes=True, total_steps=100, at_mean=False):
    for rank in (0, 1):
        writer = EventWriter.for_process(root, role="trainer", index=rank)
        writer.write(
            "blocks",
            policy="linear",
            total_steps=total_steps,
            interval=5,
            blocks=[{"name": "stem"}, {"name": "head"}],
        )
        if freezes:
            if rank == 0:
                writer.write("decision", step=9, frontier=1, was=0, reason="9.0% of training")
            writer.write("apply", step=10, frontier=1, was=0, at_mean=at_mean, seconds=0.004, learning_rate=0.1)
        writer.write(
            "trainer_end",
            steps=100,
            reduced_bytes=3_000_000,
            dropped_bytes=1_000_000,
            saved_s_estimate=12.3,
            freezes=[1] if freezes else [],
        )
        writer.close()
        # One file a process: the same process writes twice here, so make the names differ.
        for path in (root / "events").glob(f"*trainer{rank}*"):
            path.rename(path.with_name(f"rank{rank}.jsonl"))
    (root / "result.json").write_text(
        json.dumps({"status": "succeeded", "exit_code": 0, "seconds": 61.0, "restarts": 1, "message": ""})
    )


def test_a_report_says_what_froze_when_and_why_and_what_it_saved(tmp_path):
    recorded(tmp_path)
    text = report(tmp_path)
    assert "succeeded with exit code 0 after 61.0 s, 1 restarts" in text
    assert "Policy linear of 100 steps" in text
    assert "step      10: 0 -> 1, learning rate 0.1; 9.0% of training" in text
    assert text.count("0 -> 1") == 1, "masks are the same on all ranks: they are told once"
    assert "1 MB of 4 MB (25%), counted" in text
    assert "about 12.3 s, estimated" in text
    assert "applying 1 masks: 4 ms" in text


def test_it_says_that_blocks_froze_at_the_mean_of_their_weights(tmp_path):
    recorded(tmp_path)
    assert "at the mean" not in report(tmp_path)
    recorded(tmp_path / "at-mean", at_mean=True)
    assert "0 -> 1, at the mean of their last weights, learning rate 0.1; 9.0%" in report(tmp_path / "at-mean")


def test_a_run_that_was_started_again_is_told_by_its_last_end(tmp_path):
    """Counters go on through the checkpoint."""
    recorded(tmp_path)
    writer = EventWriter.for_process(tmp_path, role="trainer", index=0)
    writer.write("trainer_end", steps=250, reduced_bytes=1, dropped_bytes=3, saved_s_estimate=1.0, freezes=[1])
    writer.close()
    assert "over 250 steps" in report(tmp_path)


def test_a_length_that_was_learned_is_told_with_its_source(tmp_path):
    recorded(tmp_path, total_steps=None)
    writer = EventWriter.for_process(tmp_path, role="trainer", index=0)
    writer.write("job_length", step=40, total_steps=100, source="CosineAnnealingLR", steps_per_move=1.0)
    writer.write("interval", step=41, was=10, interval=30)
    writer.close()
    assert "of 100 steps, as CosineAnnealingLR has it, a decision every" in report(tmp_path)
    assert "steps, every 30 from step 41." in report(tmp_path)


def test_a_run_that_froze_nothing_says_so(tmp_path):
    recorded(tmp_path, freezes=False)
    text = report(tmp_path)
    assert "No block was frozen" in text
    assert "estimated" not in text


def test_an_evaluation_is_counted_once_though_every_distance_has_a_score_with_its_cost(tmp_path):
    recorded(tmp_path)
    writer = EventWriter.for_process(tmp_path, role="reference", index=0)
    for step, distances in ((10, (5,)), (15, (5, 10)), (20, (5, 10, 20))):
        for lag_steps in distances:
            writer.write(
                "reference_score", step=step, generation=0, lag_steps=lag_steps, cost_s=0.3 + step / 1e6, cpu_s=0.25
            )
    writer.close()
    assert "reference processes: 3 evaluations, 750 ms of computing" in report(tmp_path)


def test_a_run_without_result_or_model_is_told_apart(tmp_path):
    EventWriter.for_process(tmp_path, role="launcher", index=0).write("start")
    text = report(tmp_path)
    assert "there is no result.json" in text
    assert "no FreezeAwareDDP took part" in text


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run directory"):
        report(tmp_path)
    with pytest.raises(ValueError, match="takes one argument"):
        main([])


def test_the_command_prints_the_report(tmp_path, capsys):
    recorded(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "Frozen front blocks" in capsys.readouterr().out


def test_what_went_wrong_is_counted_under_the_names_the_launcher_writes(tmp_path):
    recorded(tmp_path)
    writer = EventWriter.for_process(tmp_path, role="launcher", index=0)
    for given_up in (False, True):
        writer.write("reference_exit", reference=0, returncode=-9, given_up=given_up)
    writer.close()
    assert "Noticed: reference exit 2 times" in report(tmp_path)


def test_every_kind_of_trouble_is_one_that_some_process_writes():
    from pathlib import Path

    from kgtrun.report import TROUBLES

    root = Path(__file__).resolve().parents[2]
    sources = "".join(
        p.read_text() for room in ("launcher", "kgt_ddp", "kgt_ddp/reference") for p in (root / room).glob("*.py")
    )
    assert [kind for kind in TROUBLES if f'"{kind}"' not in sources] == []
