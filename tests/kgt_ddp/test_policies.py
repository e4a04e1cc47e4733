from __future__ import annotations

import pytest

from kgt_ddp.errors import PolicyError
from kgt_ddp.policies.gradnorm import GradNorm
from kgt_ddp.policies.kgt import Kgt
from kgt_ddp.policies.kgt_paper import KgtPaper
from kgt_ddp.policies.policy import Observation
from kgt_ddp.policies.schedules import Linear, NeverFreeze, Replay, Static
from kgt_ddp.policy_spec import parse_policy, policy_names
from kgtrun.contract.events import EventWriter


def seen(step, *, total=100, blocks=10, now=0):
    return Observation(step=step, apply_step=step, total_steps=total, num_blocks=blocks, frontier=now)


def frontier(policy, step, **facts):
    return policy.decide(seen(step, **facts)).frontier


def test_none_keeps_what_is():
    assert frontier(NeverFreeze(), 50, now=0) == 0


def test_static_freezes_from_its_step_on_and_never_all():
    policy = Static(blocks=3, step=10)
    assert [frontier(policy, s) for s in (9, 10, 99)] == [0, 3, 3]
    assert frontier(Static(blocks=99), 0) == 9


def test_linear_goes_from_none_at_a_quarter_to_eight_of_ten_at_three_quarters():
    policy = Linear()
    assert [frontier(policy, s) for s in (0, 25, 31, 32, 50, 74, 75, 100)] == [0, 0, 0, 1, 4, 7, 8, 8]


def test_linear_moves_in_as_few_jumps_as_asked():
    policy = Linear(moves=2)
    assert sorted({frontier(policy, s) for s in range(100)}) == [0, 4, 8]


def test_replay_repeats_a_timetable():
    policy = Replay([(5, 1), (9, 3), (20, 0)])
    assert [frontier(policy, s) for s in (4, 5, 8, 9, 19, 20)] == [0, 1, 1, 3, 3, 0]


def test_every_policy_is_built_from_its_text():
    assert parse_policy("static:blocks=3,step=7") == Static(blocks=3, step=7)
    assert parse_policy("linear: start=0.3, stop=0.6 ,moves=2") == Linear(start=0.3, stop=0.6, moves=2)
    assert isinstance(parse_policy("none"), NeverFreeze)
    assert parse_policy("gradnorm:intervals=8") == GradNorm(intervals=8)
    assert parse_policy("kgt-paper:window=6,tolerance=0.1") == KgtPaper(window=6, tolerance=0.1)
    assert parse_policy("kgt:tolerance=0.02") == Kgt(tolerance=0.02)
    assert {"gradnorm", "kgt", "kgt-paper", "linear", "none", "replay", "static"} <= set(policy_names())


def test_replay_reads_the_masks_of_a_recorded_run(tmp_path):
    for rank in (0, 1):
        writer = EventWriter.for_process(tmp_path, role="trainer", index=rank)
        writer.write("apply", step=9, frontier=2)
        writer.write("apply", step=3, frontier=1)
        writer.close()
        (tmp_path / "events" / f"{rank}").mkdir()
    assert parse_policy(f"replay:{tmp_path}") == Replay([(3, 1), (9, 2)])


def test_replay_freezes_blocks_as_the_recorded_run_did(tmp_path):
    writer = EventWriter.for_process(tmp_path, role="trainer", index=0)
    writer.write("blocks", weight_mean=0.1)
    for step, at_mean in ((3, True), (9, False), (12, True)):
        writer.write("apply", step=step, frontier=step // 3, at_mean=at_mean)
    writer.close()
    replay = parse_policy(f"replay:{tmp_path}")
    assert replay.weight_mean == 0.1
    assert [replay.decide(seen(step)).at_mean for step in (3, 9, 12)] == [True, False, True]


FREEZING = ("static:blocks=1,", "linear:", "gradnorm:", "kgt-paper:", "kgt:")


@pytest.mark.parametrize("start", FREEZING)
def test_every_policy_that_freezes_can_put_a_block_to_its_mean(start):
    assert parse_policy(f"{start}weight_mean=0.25").weight_mean == 0.25


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("freeze", "unknown policy 'freeze': use one of"),
        ("static", "blocks"),
        ("static:blocks=many", "not a whole number"),
        ("linear:begin=0.1", "its options: start=…, stop=…"),
        ("linear:start=0.8", "start < stop"),
        ("linear:start", "not an option"),
        ("none:x=1", "its options: none"),
        ("gradnorm:intervals=1", "at least 2"),
        ("kgt-paper:window=1", "at least 2"),
        ("kgt:tolerance=2", "between 0 and 1"),
        ("kgt-paper:_booted=1", "its options: window=…, tolerance=…, thaw=…"),
        *[(f"{name}weight_mean=1", "at least 0 and below 1") for name in FREEZING],
        ("replay:", "needs the directory"),
    ],
)
def test_a_wrong_specification_says_what_would_be_valid(spec, says):
    with pytest.raises(PolicyError, match=says):
        parse_policy(spec)


def test_a_run_without_masks_cannot_be_replayed(tmp_path):
    (tmp_path / "events").mkdir()
    with pytest.raises(PolicyError, match="nothing to replay"):
        parse_policy(f"replay:{tmp_path}")


def test_replay_leaves_out_what_a_job_that_was_started_again_did_not_come_to(tmp_path, monkeypatch):
    lives = {
        11: [
            ("blocks", {"step": 0}),
            ("apply", {"step": 3, "frontier": 1, "at_mean": False}),
            ("apply", {"step": 9, "frontier": 2, "at_mean": False}),
        ],
        12: [
            ("blocks", {"step": 6}),
            ("resume", {"step": 6, "frontier": 1}),
            ("apply", {"step": 8, "frontier": 3}),
            ("apply", {"step": 9, "frontier": 4, "at_mean": True}),
        ],
    }
    for pid, events in lives.items():
        monkeypatch.setattr("kgtrun.contract.events.os.getpid", lambda pid=pid: pid)
        writer = EventWriter.for_process(tmp_path, role="trainer", index=0)
        for kind, fields in events:
            writer.write(kind, **fields)
        writer.close()
    replay = parse_policy(f"replay:{tmp_path}")
    assert replay.timetable == [(3, 1), (6, 1), (8, 3), (9, 4)] and replay.as_they_were == {3}
