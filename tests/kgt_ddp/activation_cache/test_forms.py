"""What is proved of a model is proved of one form of its call; other forms (a flag is set, say) are checked, too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from kgt_ddp import CachedDataset, CachedLoader
from kgt_ddp.activation_cache import forms, key
from tests.kgt_ddp.activation_cache.jobs import both, equal, job
from tests.kgt_ddp.networks import Residual, SmallResNet


def images(count=4, *, seed=1, **flags):
    g = torch.Generator().manual_seed(seed)
    return [((torch.randn(4, 1, 8, 8, generator=g),), flags) for _ in range(count)]


def clips(frames, count=3):
    g = torch.Generator().manual_seed(frames)
    return [((torch.randn(4, frames, 1, 8, 8, generator=g),), {}) for _ in range(count)]


class Auxiliary(SmallResNet):
    """Reads block 0 from behind block 2, where it is asked to."""

    def forward(self, x, aux=False, scale=1.0):
        first = self.blocks[0](self.stem(x))
        x = self.blocks[2](self.blocks[1](first))
        return self.head(self.blocks[3](x + first if aux else x).mean((2, 3))) * scale


class Frames(nn.Module):
    """A stem that each frame goes through, or each but the first. Input (batch, frames, 1, 8, 8), output (batch, 5)."""

    def __init__(self, first=0):
        super().__init__()
        self.first = first
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Residual(8) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.stack([self.stem(x[:, t]) for t in range(self.first, x.shape[1])]).mean(0)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class FrameByFrame(Frames):
    """Its blocks, too, are called once a frame."""

    def forward(self, x):
        total = 0
        for t in range(x.shape[1]):
            y = self.stem(x[:, t])
            for block in self.blocks:
                y = block(y)
            total = total + y
        return self.head(total.mean((2, 3)))


def test_a_call_of_another_form_that_reads_inside_the_prefix_is_not_given_what_was_proved_without(tmp_path, caplog):
    batches = [*images(), *images(aux=True)]
    ours, theirs, summary = both(Auxiliary, batches, 2, tmp_path)
    assert equal(ours, theirs)
    assert summary["reason"] is None and summary["full_batches"] >= 5, "the form that was proved first is cached"
    lines = [line for line in caplog.messages if "another form" in line]
    assert len(lines) == 1 and "reads inside block blocks.0 from behind" in lines[0]


def test_a_call_of_another_form_is_cached_once_it_is_proved(tmp_path):
    with job(Auxiliary, images()[0], 2, tmp_path) as cached:
        cached.epochs(images(), 2)
        before = cached.cache.summary()
        other = images(seed=2, scale=2.0)
        cached.epochs(other, 3)
        after = cached.cache.summary()
        assert after["full_batches"] - before["full_batches"] >= 4
        assert after["reason"] is None


def test_a_call_whose_form_is_always_new_is_checked_a_few_times_and_no_more(tmp_path, monkeypatch, caplog):
    checks = []
    check = forms.first_use
    monkeypatch.setattr(forms, "first_use", lambda *args, **kwargs: checks.append(None) or check(*args, **kwargs))
    with job(Auxiliary, images()[0], 2, tmp_path) as cached:
        cached.epochs(images(), 2)
        for step in range(40):
            cached.step((images()[0][0], {"scale": 2.0 + step // 3}))
        assert len(checks) <= 1 + forms.MOST_LOOKS // 2
        before = cached.cache.counters.full_batches
        cached.epochs(images(), 1)
        assert cached.cache.counters.full_batches == before + 4
        assert cached.cache.refused is None
    assert len([line for line in caplog.messages if "ever new forms" in line]) == 1


def test_a_model_that_is_called_in_ever_new_forms_from_the_start_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "first_use", None)
    with job(Auxiliary, images()[0], 2, tmp_path) as cached:
        for step in range(forms.MOST_LOOKS + 10):
            cached.step((images()[0][0], {"scale": 2.0 + step}))
        assert "a form of the model's call that comes again" in cached.cache.refused


class Gathers(SmallResNet):
    """Compares with the other ranks' outputs, where it is asked to."""

    def forward(self, x, gather=False):
        x = super().forward(x)
        if not gather:
            return x
        self.num_gathered = getattr(self, "num_gathered", 0) + 1
        others = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(others, x.detach())
        return x - sum(others).mean(0)


def gathering(rank, world, folder):
    lines = []
    forms.logger.warning = lambda text, *args: lines.append(text % args)
    with job(Gathers, images()[0], 2, folder) as cached:
        cached.epochs(images(), 2)
        cached.epochs(images(gather=True), 2)
        full = cached.cache.counters.full_batches
        cached.epochs(images(), 1)
        return cached.model.num_gathered, lines, cached.cache.counters.full_batches - full


@pytest.mark.integration
def test_a_call_of_another_form_that_communicates_is_not_run_on_the_side(run_ranks, tmp_path):
    """The other ranks would have to do so at the same time."""
    ((num_gathered, lines, full_batches),) = run_ranks(1, gathering, tmp_path)
    assert num_gathered == 8, "once a step"
    assert len(lines) == 1 and "communicates in its own forward" in lines[0]
    assert full_batches == 4


class Mixing(SmallResNet):
    """Labels reach the prefix, where they are asked to."""

    def forward(self, x, labels, mix=False):
        return super().forward(x + labels[:, None, None, None] if mix else x) + labels[:, None]


def test_what_one_form_does_not_depend_on_is_in_the_keys_of_the_one_that_is_proved_next(tmp_path):
    """Weights are written, and the first batch after that is of the form in which labels reach the prefix."""

    def batches(epoch, **flags):
        return [(args, {"labels": torch.arange(4.0).roll(epoch), **flags}) for args, _ in images()]

    with (
        job(Mixing, batches(0)[0], 2, tmp_path) as cached,
        job(Mixing, batches(0)[0], 2, tmp_path, mode="off") as plain,
    ):
        for one in (cached, plain):
            one.epochs(batches(0), 2)
            with torch.no_grad():
                one.model.stem[0].weight.mul_(1.5)
        for epoch in range(5):
            some = batches(epoch, mix=True)
            assert equal(cached.epochs(some, 1), plain.epochs(some, 1))
        assert cached.cache._session.keys.excluded == set()


def test_a_form_that_did_not_pass_stays_out_when_weights_have_changed(tmp_path, caplog):
    with job(Auxiliary, images()[0], 2, tmp_path) as cached:
        cached.epochs(images(), 2)
        cached.epochs(images(aux=True), 2)
        with torch.no_grad():
            cached.model.stem[0].weight.mul_(1.5)
        cached.epochs(images(aux=True), 2)
        cached.epochs(images(), 3)
        assert cached.cache.refused is None
        before = cached.cache.counters.full_batches
        cached.epochs(images(), 1)
        assert cached.cache.counters.full_batches == before + 4
    assert len([line for line in caplog.messages if "another form" in line]) == 1


def test_nothing_is_hashed_for_calls_of_a_form_that_did_not_pass(tmp_path, monkeypatch):
    with job(Auxiliary, images()[0], 2, tmp_path) as cached:
        cached.epochs(images(), 2)
        cached.epochs(images(aux=True), 2)
        monkeypatch.setattr(key, "_bytes_of", None)
        cached.epochs(images(aux=True), 1)


class Masked(SmallResNet):
    """Takes a mask (length, length) that belongs to no sample, for clips of any length."""

    def forward(self, x, mask):
        return super().forward(x + mask.mean())


def test_a_mask_for_each_length_is_no_new_form_of_the_call(tmp_path, caplog):
    lengths = range(5, 25)
    batches = [(args, {"mask": torch.ones(n, n).tril()}) for n, (args, _) in zip(lengths, images(20), strict=True)]
    ours, theirs, summary = both(Masked, batches, 2, tmp_path)
    assert equal(ours, theirs)
    assert summary["full_batches"] >= 20 and "ever new forms" not in caplog.text


def test_a_batch_whose_labels_are_all_alike_tells_nothing_of_another_form(tmp_path, caplog):
    class Labelled(SmallResNet):
        def forward(self, x, labels, scale=1.0):
            return super().forward(x) * scale + labels[:, None]

    def batches(labels, **flags):
        return [(args, {"labels": labels, **flags}) for args, _ in images()]

    with job(Labelled, batches(torch.arange(4.0))[0], 2, tmp_path) as cached:
        cached.epochs(batches(torch.arange(4.0)), 2)
        cached.epochs(batches(torch.ones(4), scale=2.0)[:2], 1)
        cached.epochs(batches(torch.arange(4.0), scale=2.0), 2)
        before = cached.cache.counters.full_batches
        cached.epochs(batches(torch.arange(4.0), scale=2.0), 1)
        assert cached.cache.counters.full_batches == before + 4
    assert "another form" not in caplog.text


def test_labels_that_keys_leave_out_may_reach_the_prefix_in_another_form(tmp_path, caplog):
    def batches(epoch, **flags):
        labels = torch.arange(4.0).roll(epoch)
        return [(args, {"labels": labels, **flags}) for args, _ in images()]

    with (
        job(Mixing, batches(0)[0], 2, tmp_path) as cached,
        job(Mixing, batches(0)[0], 2, tmp_path, mode="off") as plain,
    ):
        for epoch in range(8):
            some = [*batches(epoch), *batches(epoch, mix=True)]
            assert equal(cached.epochs(some, 1), plain.epochs(some, 1))
        assert cached.cache._session.keys.excluded == {"labels"}
        assert cached.cache.counters.full_batches == 1 + 4 * 6
    assert caplog.text.count("the frozen blocks may depend on labels") == 1


@pytest.mark.parametrize("first", [0, 1])
def test_more_calls_of_a_skipped_module_than_were_proved(first, tmp_path):
    """As many as there are frames; or one less, which nothing can tell of a batch of another length."""
    ours, theirs, summary = both(lambda: Frames(first), [*clips(7), *clips(12), *clips(5)], 2, tmp_path)
    assert equal(ours, theirs)
    assert summary["reason"] is None and summary["full_batches"] == (15 if first else 3)


def test_a_frontier_block_that_is_called_once_and_later_more_often(tmp_path):
    ours, theirs, summary = both(FrameByFrame, [*clips(1, 4), *clips(3)], 2, tmp_path)
    assert equal(ours, theirs)
    assert "block blocks.1 is called 3 times in a forward" in summary["reason"]


class Chunked(SmallResNet):
    """Computes a large batch in pieces."""

    def forward(self, x):
        return torch.cat([super(Chunked, self).forward(part) for part in x.split(8)])


def test_known_samples_in_a_batch_for_which_the_frontier_block_is_called_twice(tmp_path):
    batches = [*images(3), ((images(seed=2)[0][0][0][:3],), {})]
    large = ((torch.cat([args[0] for args, _ in batches[:3]]),), {})
    with (
        job(Chunked, batches[0], 2, tmp_path) as cached,
        job(Chunked, batches[0], 2, tmp_path, mode="off") as plain,
    ):
        cached.epochs(batches, 3)
        hits = cached.cache.counters.hits
        assert equal([cached.step(large)], [plain.step(large)])
        assert cached.cache.counters.hits == hits, "one that is larger than any before is computed first"
        assert "block blocks.1 is called 2 times in a forward" in cached.cache.refused


class ReadsItsInput(SmallResNet):
    """Where it is asked to, behind all blocks."""

    def forward(self, x, again=False):
        return super().forward(x) + (x.mean((1, 2, 3))[:, None] if again else 0)


class Freezing:
    def __init__(self, cache):
        self.cache = cache


def test_what_need_not_be_decoded_for_one_form_is_decoded_for_another(tmp_path):
    samples = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    data = CachedDataset([(x, 0) for x in samples], light=lambda i: (None, 0))
    with job(ReadsItsInput, ((samples[:4],), {}), 2, tmp_path) as cached:
        cached.wrapper.freezing = Freezing(cached.cache)
        loader = CachedLoader(DataLoader(data, 8), cached.wrapper)
        for again in (False, True):
            left_out = 0
            for _ in range(5):
                for x, _ in loader:
                    left_out += int(torch.isnan(x).any())
                    assert bool(torch.isfinite(cached.wrapper(x.clone(), again=again)).all())
                cached.cache.drain()
            assert left_out <= 1 if again else left_out > 12, "of the other form, but for what was drawn before"
        assert not data.ids.dropped
