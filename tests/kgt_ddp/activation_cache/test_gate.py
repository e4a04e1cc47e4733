"""The gate decides by numbers alone: opens where hits pay, closes where they do not, asks again ever more rarely."""

from __future__ import annotations

from kgt_ddp.activation_cache.gate import LONGEST_PAUSE, PATIENCE, PAUSE, RETRY, WINDOW, Gate, Spent

BATCH = 64


def feed(gate, batches, *, rate=0.0, undecoded=0.0, lookup_s=1e-4, read_s=1e-4, write_s=1e-4, wall_s=0.1):
    """So many batches; returns how many of them used the cache."""
    used = 0
    for _ in range(batches):
        if not gate.admits():
            continue
        used += 1
        hits = int(rate * BATCH)
        costs = {"lookup_s": lookup_s, "read_s": read_s, "write_s": write_s}
        gate.spent(Spent(samples=BATCH, hits=hits, undecoded=int(undecoded * hits), wall_s=wall_s, **costs))
    return used


def gate(compute_s=0.03, **kwargs):
    made = Gate(**kwargs)
    made.computed(BATCH, compute_s)
    return made


def test_a_first_epoch_without_hits_is_borne_and_hits_open_it():
    g = gate()
    feed(g, 500)
    assert g.state == "trying"
    feed(g, WINDOW, rate=1.0)
    assert g.state == "open"


def test_hits_that_cost_more_than_computing_close_it():
    g = gate(compute_s=0.001)
    feed(g, 2 * WINDOW, rate=1.0, read_s=0.004)
    assert g.state == "closed"
    assert "costs" in g.reason


def test_random_augmentation_closes_it_after_its_patience():
    g = gate(patience=100 * BATCH)
    used = feed(g, 400)
    assert g.state == "closed"
    assert 100 <= used <= 100 + WINDOW
    assert "0.0% hits after" in g.reason


def test_a_try_that_costs_much_ends_soon():
    g = gate(compute_s=0.004)
    used = feed(g, 1000, write_s=0.02)
    assert used == 2 * WINDOW + RETRY
    assert g.state == "closed"


def test_tries_without_hits_cost_a_bounded_share_for_ever():
    g = gate(patience=BATCH)
    feed(g, PATIENCE)
    batches = 20 * LONGEST_PAUSE
    used = feed(g, batches)
    assert 0 < used <= batches * RETRY / LONGEST_PAUSE * 1.1


def test_a_later_try_with_hits_opens_it_again():
    g = gate(patience=BATCH)
    feed(g, WINDOW)
    assert g.state == "closed"
    feed(g, PAUSE + RETRY, rate=1.0)
    assert g.state == "open"
    feed(g, 10 * WINDOW)
    assert g.state == "closed", "the hits have ended"


def test_a_shallow_prefix_with_wide_outputs_is_not_tried():
    g = gate(compute_s=BATCH * 20e-6)
    g.predict(read_s_per_sample=40e-6)
    assert g.state == "closed"
    assert "reading a sample would take 40 us, computing it takes 20 us" in g.reason
    g = gate(compute_s=BATCH * 200e-6)
    g.predict(read_s_per_sample=40e-6)
    assert g.state == "trying"


def test_what_need_not_be_decoded_counts():
    """Reading takes longer than computing, but not than decoding and computing."""
    for decode_s, undecoded, state in ((0.0, 1.0, "closed"), (2e-4, 0.0, "closed"), (2e-4, 1.0, "open")):
        g = gate(compute_s=0.001)
        g.decodes(decode_s)
        feed(g, 2 * WINDOW, rate=1.0, undecoded=undecoded, read_s=0.004)
        assert g.state == state
    g.decodes(0.0)
    feed(g, 2 * WINDOW, rate=1.0, undecoded=1.0, read_s=0.004)
    assert g.state == "closed"


def test_a_read_is_compared_with_decoding_too():
    g = gate(compute_s=BATCH * 20e-6)
    g.decodes(1e-3)
    g.predict(read_s_per_sample=40e-6)
    assert g.state == "trying"
    g.predict(read_s_per_sample=2e-3)
    assert g.state == "closed"
    assert "decoding and computing it takes 1020 us" in g.reason


def test_a_first_epoch_may_cost_more_where_decoding_could_be_saved():
    for decode_s, state in ((0.0, "closed"), (3e-3, "trying")):
        g = gate(compute_s=0.004)
        g.decodes(decode_s)
        feed(g, 4 * WINDOW, write_s=0.01)
        assert g.state == state


def test_without_a_measurement_nothing_is_predicted():
    g = Gate()
    g.predict(read_s_per_sample=1.0)
    assert g.state == "trying"
    assert g.compute_s_per_sample == 0.0


def test_older_measurements_fade():
    g = Gate()
    for _ in range(100):
        g.computed(BATCH, 0.064)
    for _ in range(200):
        g.computed(BATCH, 0.128)
    assert abs(g.compute_s_per_sample - 0.002) < 1e-4


def test_some_windows_of_bad_luck_do_not_close_it():
    g = gate()
    for _ in range(5):
        feed(g, WINDOW, rate=1.0)
        feed(g, WINDOW, rate=0.1, read_s=0.01)
    assert g.state == "open"


def test_a_try_may_cost_more_where_the_data_is_known_to_repeat():
    """Half of what a hit saves, paid once, comes back with the first epoch of hits."""
    costs = {"write_s": 0.012, "wall_s": 0.1}
    for repeating, state in ((0.0, "closed"), (1.0, "trying")):
        g = gate(compute_s=0.03, repeating=repeating)
        feed(g, 4 * WINDOW, **costs)
        assert g.state == state
    g = gate(compute_s=0.03, repeating=1.0)
    feed(g, 4 * WINDOW, write_s=0.02)
    assert g.state == "closed"


def test_it_knows_whether_it_is_closed_for_lack_of_hits_alone():
    in_vain, dear, shallow = gate(patience=BATCH), gate(compute_s=0.004), gate(compute_s=BATCH * 20e-6)
    feed(in_vain, WINDOW)
    feed(dear, 2 * WINDOW, write_s=0.02)
    shallow.predict(read_s_per_sample=40e-6)
    assert [g.state for g in (in_vain, dear, shallow)] == ["closed"] * 3
    assert [g.in_vain for g in (in_vain, dear, shallow)] == [True, False, False]
    for g in (dear, shallow):
        feed(g, PAUSE + RETRY)
        assert g.state == "closed" and not g.in_vain, "a short try without hits does not make it cheaper"


def test_it_begins_again_with_another_patience():
    g = gate(patience=BATCH)
    feed(g, WINDOW)
    g.begin_again(3 * WINDOW * BATCH, repeating=0.0, reason="")
    assert feed(g, 2 * WINDOW) == 2 * WINDOW and g.state == "trying"
    feed(g, WINDOW)
    assert g.state == "closed"
    assert g.compute_s_per_sample > 0
