from __future__ import annotations

import math

import pytest

from benchmarks.scaling_model import (
    Network,
    Profile,
    Row,
    broadcast_seconds,
    buckets,
    reduce_seconds,
    slowest,
    speedup,
    step_seconds,
)

MIB = 1 << 20
SLOW = Network(link_bytes_per_s=100 * MIB, node_bytes_per_s=math.inf, latency_s=0.0)


def profile(*gradients, backward_s=1.0):
    return Profile(forward_s=0.5, backward_s=backward_s, optimizer_s=0.25, gradients=gradients)


def test_buckets_fill_in_order_of_readiness():
    assert buckets([(0.1, MIB // 2), (0.2, MIB // 2), (0.3, 20 * MIB), (0.4, 10 * MIB), (0.5, 5)]) == [
        (0.2, MIB),
        (0.4, 30 * MIB),
        (0.5, 5),
    ]
    assert buckets([]) == []


def test_buckets_in_place_of_gradients_are_the_same_buckets():
    found = buckets([(0.1 * i, 3 * MIB) for i in range(1, 40)])
    assert len(found) > 2 and buckets(found) == found


def row(forward_s, backward_s, optimizer_s, *ready_s):
    return Row(forward_s=forward_s, backward_s=backward_s, optimizer_s=optimizer_s, ready_s=ready_s)


def test_all_wait_for_the_host_that_came_last_in_each_step():
    quick, late = row(0.1, 0.2, 0.1, 0.15), row(0.2, 0.4, 0.1, 0.3)
    late_in_its_optimizer = row(0.1, 0.2, 0.5, 0.15)
    assert slowest([[quick, late, quick], [late, quick, late_in_its_optimizer]]) == [late, late, late_in_its_optimizer]
    with pytest.raises(ValueError):
        slowest([[quick], [quick, quick]])


def test_a_ring_moves_every_byte_once_between_two_and_nearly_twice_between_many():
    assert reduce_seconds(100 * MIB, 1, SLOW) == 0
    assert reduce_seconds(100 * MIB, 2, SLOW) == pytest.approx(1.0)
    assert reduce_seconds(100 * MIB, 64, SLOW) == pytest.approx(2 * 63 / 64)
    far = Network(link_bytes_per_s=math.inf, node_bytes_per_s=50 * MIB, latency_s=0.01)
    assert reduce_seconds(50 * MIB, 3, far) == pytest.approx(4 * 0.01 + 4 / 3)


def test_a_broadcast_goes_down_a_tree():
    network = Network(link_bytes_per_s=100 * MIB, node_bytes_per_s=50 * MIB, latency_s=0.01)
    assert broadcast_seconds(100 * MIB, 1, network) == 0
    assert broadcast_seconds(100 * MIB, 2, network) == pytest.approx(3.01)
    assert broadcast_seconds(0, 64, network) == pytest.approx(0.06)
    assert broadcast_seconds(0, 65, network) == pytest.approx(0.07)


def test_the_forward_waits_until_buffers_are_equal():
    far = Network(link_bytes_per_s=math.inf, node_bytes_per_s=math.inf, latency_s=0.01)
    alone = profile((0.1, 10 * MIB))
    equal = Profile(forward_s=0.5, backward_s=1.0, optimizer_s=0.25, gradients=alone.gradients, broadcasts=(1000, 8))
    assert step_seconds(equal, 2, far) == pytest.approx(step_seconds(alone, 2, far) + 2 * 0.01)
    assert step_seconds(equal, 1, far) == alone.step_s


def test_reducing_hides_behind_the_backward_and_shows_when_it_is_longer():
    assert step_seconds(profile((0.1, 10 * MIB)), 2, SLOW) == pytest.approx(1.75)
    assert step_seconds(profile((1.0, 10 * MIB)), 2, SLOW) == pytest.approx(1.85)
    # Two buckets, one after the other on the link.
    assert step_seconds(profile((0.5, 100 * MIB), (1.0, 100 * MIB)), 2, SLOW) == pytest.approx(0.5 + 2.5 + 0.25)


def test_adding_and_copying_delays_the_backward():
    busy = Network(link_bytes_per_s=math.inf, node_bytes_per_s=100 * MIB, latency_s=0.0)
    assert step_seconds(profile((0.1, 50 * MIB)), 2, busy) == pytest.approx(0.5 + 1.5 + 0.25)
    assert step_seconds(profile((0.5, 50 * MIB), (1.0, 50 * MIB)), 2, busy) == pytest.approx(0.5 + 2.0 + 0.25)


def test_what_freezing_saves_goes_from_compute_to_bytes_as_the_link_gets_slower():
    plain = profile((0.5, 50 * MIB), (1.0, 50 * MIB))
    frozen = profile((0.5, 50 * MIB), backward_s=0.5)
    gains = [
        speedup(plain, frozen, 2, Network.of_link(rate, node_bytes_per_s=math.inf, latency_s=0))
        for rate in (1e12, 1e9, 2e8)
    ]
    assert gains[0] == pytest.approx(1.75 / 1.25, rel=1e-3)
    assert gains[0] < gains[-1] < 2
