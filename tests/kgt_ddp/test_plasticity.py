from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from kgt_ddp.plasticity import distance, first_floating_tensor, gram, plasticity, similarity


def test_similarity_of_a_hand_computed_batch():
    # A·Aᵀ = [[1, 2], [2, 4 + 4]]; rows scaled by 1/√5 and 1/√68
    gram = similarity(torch.tensor([[1.0, 0.0], [2.0, 2.0]]))
    expected = torch.tensor([[1 / math.sqrt(5), 2 / math.sqrt(5)], [2 / math.sqrt(68), 8 / math.sqrt(68)]])
    torch.testing.assert_close(gram, expected)


def test_plasticity_of_a_hand_computed_pair():
    # orthogonal samples: G = I; identical samples: every entry 1/√2
    apart, alike = torch.eye(2), torch.ones(2, 2)
    off, on = (1 / math.sqrt(2)) ** 2, (1 - 1 / math.sqrt(2)) ** 2
    assert plasticity(apart, alike) == pytest.approx((2 * on + 2 * off) / 4, rel=1e-6)


def test_scale_and_rotation_of_the_features_do_not_count():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 6, generator=generator)
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    assert plasticity(a, 3.0 * a @ q) < 1e-12
    assert plasticity(a, torch.randn(8, 6, generator=generator)) > 1e-3
    assert plasticity(a, 1e-9 * a) < 1e-12


def test_images_and_bf16_are_flattened_per_sample_in_fp32():
    a = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(similarity(a), similarity(a.reshape(4, 75)))
    assert similarity(a.bfloat16()).dtype == torch.float32
    assert 0 < plasticity(a, a.bfloat16()) < 1e-5


def test_padding_does_not_count_and_real_tokens_do():
    a = torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    b = a.clone()
    b[1, 2:] = 1e6
    b[2, 1:] = float("nan")
    assert plasticity(a, b, mask) == 0.0
    b[1, 1] += 1.0
    assert plasticity(a, b, mask) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_dont_know(bad):
    a = torch.randn(4, 5)
    b = a.clone()
    b[2, 3] = bad
    assert similarity(b) is None
    assert plasticity(a, b) is None
    assert plasticity(b, b) is None


def test_overflow_to_infinity_is_dont_know():
    assert similarity(torch.full((2, 3), 1e30)) is None


def test_one_sample_no_samples_and_other_batches_are_dont_know():
    assert similarity(torch.randn(1, 5)) is None
    assert similarity(torch.randn(0, 5)) is None
    assert similarity(torch.tensor(1.0)) is None
    assert distance(torch.eye(2), torch.eye(3)) is None
    assert distance(None, torch.eye(3)) is None


def test_dead_samples_are_zero_rows_not_nan():
    a = torch.zeros(3, 4)
    a[0, 0] = 1.0
    gram = similarity(a)
    assert gram[0].tolist() == [1.0, 0.0, 0.0]
    assert gram[1:].abs().sum() == 0


def test_one_number_a_sample():
    assert similarity(torch.tensor([1.0, 2.0])).shape == (2, 2)


def test_a_nested_tensor_counts_as_its_padded_form():
    nested = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(1, 2)])
    padded = first_floating_tensor((nested,))
    assert padded.shape == (2, 3, 2) and padded[1, 1:].abs().sum() == 0


@dataclass
class Output:
    ids: torch.Tensor
    hidden: torch.Tensor


def test_the_first_floating_tensor_of_a_structure():
    ids, x, y = torch.arange(3), torch.ones(3), torch.zeros(3)
    assert first_floating_tensor((ids, None, [x], y)) is x
    assert first_floating_tensor({"ids": ids, "hidden": {"x": x}}) is x
    assert first_floating_tensor(Output(ids, x)) is x
    assert first_floating_tensor((ids, "text", 3)) is None
    assert plasticity((ids,), (x,)) is None


def test_inside_a_forward_under_autocast_it_is_computed_in_fp32_all_the_same():
    activation = torch.randn(6, 50)
    with torch.autocast("cpu", torch.bfloat16):
        found = gram(activation)
    assert found.dtype == torch.float32 and torch.equal(found, gram(activation))
