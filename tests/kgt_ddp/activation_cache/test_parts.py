"""The pure parts: shapes that are inferred, outlines, codecs, and the short circuit itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kgt_ddp.activation_cache.key import Keys
from kgt_ddp.activation_cache.outputs import Outline, UnsupportedOutputError, poisoned
from kgt_ddp.activation_cache.record import Codec, segments
from kgt_ddp.activation_cache.shapes import ShapeRule
from kgt_ddp.activation_cache.short_circuit import captured, replaced, stopped_at
from kgt_ddp.activation_cache.side_run import close, on_the_side


def test_a_shape_is_told_for_new_sizes_once_all_explanations_agree():
    rule = ShapeRule()
    rule.observe((16, 7), (16, 16, 7))  # batch 16, length 7; the second 16 is the width, which nothing tells yet
    assert rule.predict((16, 7)) == (16, 16, 7)
    assert rule.predict((8, 7)) is None
    rule.observe((8, 9), (8, 16, 9))
    assert rule.predict((5, 11)) == (5, 16, 11)


def test_multiples_of_an_input_size():
    rule = ShapeRule()
    rule.observe((4, 10), (12, 5))
    rule.observe((6, 20), (18, 5))
    assert rule.predict((5, 30)) == (15, 5)


def test_a_shape_that_follows_no_rule_is_only_repeated():
    rule = ShapeRule()
    for dims, shape in (((4, 10), (4, 7)), ((5, 11), (5, 3))):
        rule.observe(dims, shape)
    assert rule.predict((4, 10)) == (4, 7)
    assert rule.predict((6, 12)) is None
    rule.observe((6, 12), (6,))
    assert rule.predict((7, 13)) is None


def test_an_outline_keeps_structure_and_says_what_it_cannot_keep():
    output = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": (torch.zeros(2, dtype=torch.int32), None, 4)}
    made = Outline(output, (2,)).stand_in((2,))
    assert made["a"].shape == (2, 3)
    assert made["a"].dtype == torch.bfloat16
    assert made["b"][1:] == (None, 4)
    with pytest.raises(UnsupportedOutputError, match="object"):
        Outline((torch.ones(2), object()), (2,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_poison_shows_in_every_dtype(dtype):
    tensor = torch.ones(3, dtype=dtype)
    assert not torch.equal(poisoned(tensor), tensor)
    assert not close(tensor, poisoned(tensor))


def round_trip(output, batch, compact):
    codec = Codec(output, batch, compact=compact)
    rows, sizes = codec.rows(output, batch), codec.lengths(batch)
    tensors, target = codec.empty_rows(batch)
    for i in range(batch.size):
        for here, there in zip(segments(rows, sizes[i], i), segments(target, sizes[i], i), strict=True):
            there[:] = here
    codec.remember_shared(output, batch)
    return codec.output(tensors, batch), sizes


def test_records_keep_every_dtype_and_what_samples_share():
    batch = Keys().batch((torch.zeros(4, 3),), {})
    output = (torch.randn(4, 5, 2), {"ids": torch.arange(4), "bias": torch.randn(1, 6)}, None, torch.randn(4) > 0)
    again, _ = round_trip(output, batch, compact=False)
    assert torch.equal(again[0], output[0])
    assert torch.equal(again[1]["ids"], output[1]["ids"])
    assert torch.equal(again[1]["bias"], output[1]["bias"])
    assert again[2] is None
    assert torch.equal(again[3], output[3])


def test_an_output_with_other_plain_values_is_another_kind_of_output():
    """A Swin stage returns height and width beside its tokens: equally many tokens may be those of another shape."""
    batch = Keys().batch((torch.zeros(4, 3),), {})
    tokens = torch.randn(4, 128, 2)
    codec = Codec((tokens, 8, 16), batch, compact=False)
    assert codec.rows((tokens, 8, 16), batch) is not None and codec.samples((tokens, 8, 16), batch) is not None
    assert codec.rows((tokens, 16, 8), batch) is None and codec.samples((tokens, 16, 8), batch) is None


def test_an_output_with_a_tensor_where_there_was_none_is_another_kind_of_output():
    """Served from a record it would be None again."""
    batch = Keys().batch((torch.zeros(4, 3),), {})
    hidden, bias = torch.randn(4, 2), torch.randn(4, 2)
    codec = Codec((hidden, None), batch, compact=False)
    assert codec.rows((hidden, None), batch) is not None
    assert codec.rows((hidden, bias), batch) is None and codec.samples((hidden, bias), batch) is None
    with_bias = Codec((hidden, bias), batch, compact=False)
    assert with_bias.rows((hidden, None), batch) is None
    assert with_bias.layout != codec.layout


def test_a_few_large_elements_do_not_hide_that_all_others_differ():
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    a[0] = 1000.0
    b = torch.cat([a[:1], a[1:] * 1.5])
    assert close(a, b, 2e-2) and not close(a, b, 2e-2, on_average=True)
    assert close(a, a.bfloat16().float(), 2e-2, on_average=True)
    assert not close(a, a + float("nan"), 2e-2, on_average=True)
    assert close(torch.zeros(3), torch.zeros(3), on_average=True)


def test_compact_records_are_half_as_long_and_rounded_once():
    batch = Keys().batch((torch.zeros(4, 3),), {})
    output = torch.randn(4, 64)
    again, sizes = round_trip(output, batch, compact=True)
    assert sizes == [[128]] * 4
    assert torch.equal(again, output.bfloat16().float())
    assert float(((again - output) / output).abs().max()) <= 2**-8


def test_text_records_have_no_padding():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = Keys().batch((), {"input_ids": mask * 3, "attention_mask": mask})
    output = torch.randn(2, 4, 8)
    again, sizes = round_trip(output, batch, compact=False)
    assert sizes == [[64], [128]]
    assert torch.equal(again[0, :2], output[0, :2])
    assert torch.equal(again[1], output[1])
    assert torch.equal(again[0, 2:], torch.zeros(2, 8))


def test_outputs_without_a_batch_in_front_are_refused():
    batch = Keys().batch((torch.zeros(4, 3),), {})
    with pytest.raises(UnsupportedOutputError, match="no batch dimension"):
        Codec(torch.zeros(3, 4), batch, compact=True)
    with pytest.raises(UnsupportedOutputError, match="another first dimension"):
        Codec((torch.zeros(4, 3), torch.zeros(2, 2)), batch, compact=True)


def test_the_short_circuit_comes_off_whatever_happens():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    own = model[1].forward = lambda x: x + 1  # a patch of the user's
    with pytest.raises(ZeroDivisionError), replaced({m: lambda call, args, kwargs: 1 / 0 for m in model}):
        model(torch.zeros(1, 2))
    assert model[1].forward is own
    assert "forward" not in model[0].__dict__


def test_a_forward_can_be_stopped_and_a_model_that_catches_errors_does_not_stop_that():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            try:
                x = self.one(x)
            except Exception:
                x = x * 0
            return self.two(x)

    model, x = Careful(), torch.ones(1, 2)
    assert torch.equal(stopped_at(model.one, lambda: model(x)), model.one(x))
    with pytest.raises(LookupError):
        stopped_at(model.one, lambda: model.two(x))
    seen = []
    with captured(model.one, seen.append):
        model(x)
    assert len(seen) == 1


def test_side_runs_restore_statistics_modes_and_random_numbers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).train()
    model.register_buffer("calls", torch.zeros(1))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.random.get_rng_state()
    with on_the_side(model):
        model(torch.randn(4, 2))
        model.calls += 1
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert model[1].training
