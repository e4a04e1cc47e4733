"""When the frontier moves on, the cut follows where that pays, and stays where it does not."""

from __future__ import annotations

from kgt_ddp.activation_cache.recut import Progress, worth_recutting

EPOCH = 1_000


def at(share, *, epochs=10, known=True, epoch=EPOCH):
    """A job of so many epochs, so far done."""
    total = 100 * epochs
    return Progress(
        epoch=epoch,
        num_samples=int(share * epochs * EPOCH),
        step=int(share * total),
        total_steps=total if known else None,
    )


def recuts(old, new, share, *, filled=1.0, finds=True, **facts):
    return worth_recutting(old, new, at(share, **facts), num_filled=int(filled * EPOCH), finds=finds)


def test_early_the_cut_follows_late_it_stays():
    assert recuts(3, 6, 0.45)
    assert recuts(6, 8, 0.3)
    assert not recuts(6, 7, 0.62)
    assert not recuts(6, 8, 0.76)
    assert not recuts(1, 8, 0.95), "in the last epoch nothing that is written is read again"


def test_records_that_are_not_there_yet_count_less():
    assert not recuts(6, 7, 0.62)
    assert recuts(6, 7, 0.62, filled=0.05, finds=False)
    assert not recuts(6, 7, 0.62, filled=0.05), "what was found counts, whoever wrote it"


def test_of_an_unknown_length_as_much_is_to_come_as_there_was():
    assert at(0.5, known=False).epochs_to_come == 5
    assert at(0.3, known=False).epochs_to_come == 3
    assert abs(at(0.3).epochs_to_come - 7) < 1e-9
    assert not recuts(2, 3, 0.25, known=False)


def test_without_an_epoch_the_cut_follows():
    assert recuts(6, 7, 0.9, epoch=None)
    assert Progress(epoch=EPOCH, num_samples=0, step=0, total_steps=100).epochs_to_come == 0
