"""Equal samples have equal keys whatever they are batched with or padded to; different ones never do."""

from __future__ import annotations

import pytest
import torch

from kgt_ddp.activation_cache.key import KEY_BYTES, Keys, UnkeyableError


def text(lengths, padded, pad=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (len(lengths), 64), generator=g)[:, :padded]
    mask = (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


def test_a_sample_has_one_key_in_any_batch_and_order():
    x = torch.randn(6, 1, 4, 4)
    keys = Keys().batch((x,), {}).keys
    assert len(set(keys)) == 6
    assert all(len(k) == KEY_BYTES for k in keys)
    assert Keys().batch((x[[4, 1]].clone(),), {}).keys == [keys[4], keys[1]]


def test_one_flipped_bit_makes_another_key():
    x = torch.randn(2, 3)
    y = x.clone()
    y.view(torch.int32)[1, 2] ^= 1
    before, after = Keys().batch((x,), {}).keys, Keys().batch((y,), {}).keys
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_flags_shapes_dtypes_and_autocast_are_part_of_the_key():
    x = torch.zeros(2, 6)
    keys = {
        Keys().batch((x,), {}).keys[0],
        Keys().batch((x,), {"flag": True}).keys[0],
        Keys().batch((x,), {"flag": False}).keys[0],
        Keys().batch((x,), {"scale": torch.tensor(2.0)}).keys[0],
        Keys().batch((x.view(2, 2, 3),), {}).keys[0],
        Keys().batch((x.int(),), {}).keys[0],
    }
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(Keys().batch((x,), {}).keys[0])
    assert len(keys) == 7


def test_two_arguments_are_not_confused():
    a, b = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    assert Keys().batch((a, b), {}).keys != Keys().batch((b, a), {}).keys
    assert Keys().batch((), {"a": a, "b": b}).keys != Keys().batch((), {"a": b, "b": a}).keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.complex64])
def test_every_dtype_is_hashed(dtype):
    x = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    keys = Keys().batch((x,), {}).keys
    assert keys[0] != keys[1]


def test_padding_is_left_out():
    short, long = text([3, 5], 5), text([3, 5, 9], 9)
    keys = Keys()
    assert keys.batch((), long).keys[:2] == keys.batch((), short).keys
    assert keys.batch((), long).padded
    assert keys.batch((), short).lengths.tolist() == [3, 5]


def test_a_longer_text_with_the_same_beginning_has_another_key():
    keys = Keys()
    assert keys.batch((), text([3, 9], 9)).keys[0] != keys.batch((), text([4, 9], 9)).keys[0]


def test_a_second_text_with_a_length_of_its_own_is_hashed_whole():
    batch = text([3, 9], 9)
    other = {**batch, "second": torch.randint(1, 30, (2, 9))}
    changed = {**other, "second": other["second"].clone()}
    changed["second"][0, 8] += 1  # behind the first text's end
    assert Keys().batch((), other).keys[0] != Keys().batch((), changed).keys[0]


def test_padding_in_front_or_between_is_not_cut():
    batch = text([3, 9], 9)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    assert Keys().batch((), batch).cut == frozenset()
    assert not Keys().batch((), batch).padded


def test_excluded_arguments_are_not_in_the_key():
    x = torch.randn(2, 3)
    keys = Keys()
    keys.excluded = {"labels"}
    a, b = ({"labels": torch.tensor(labels)} for labels in ([0, 1], [1, 0]))
    assert keys.batch((x,), a).keys == keys.batch((x,), b).keys
    assert Keys().batch((x,), a).keys != Keys().batch((x,), b).keys


def test_the_form_of_a_call_is_what_may_decide_which_way_the_model_goes():
    x, keys = torch.randn(4, 3, 5), Keys()
    form = lambda *args, **kwargs: keys.batch(args, kwargs).form  # noqa: E731
    same = [form(x), form(x + 1), form(x[:3]), form(x[:, :, :2])]
    others = [form(x.double()), form(x[0]), form(x, True), form(x, False), form(x, scale=torch.ones(())), form(x=x)]
    with torch.autocast("cpu"):
        others.append(form(x))
    assert len({*same}) == 1 and len({*same, *others}) == 1 + len(others)


def test_no_two_forms_share_keys_whatever_is_excluded():
    x, keys = torch.randn(2, 3), Keys()
    keys.excluded = {"labels"}
    given, left_out, soft = (
        keys.batch((x,), {"labels": labels}) for labels in (torch.tensor([0, 1]), None, torch.tensor([0.0, 1.0]))
    )
    assert len({given.form, left_out.form, soft.form}) == 3
    assert len({given.keys[0], left_out.keys[0], soft.keys[0]}) == 3


def test_a_model_is_lent_copies_on_the_side():
    x, scale = torch.randn(2, 3), torch.ones(())
    batch = Keys().batch((x,), {"scale": scale, "flag": 1})
    for arguments in (batch.arguments(), batch.select([0, 1])):
        (mine,), kwargs = batch.own(arguments, torch.device("cpu"))
        assert torch.equal(mine, x) and kwargs["flag"] == 1
        assert mine.data_ptr() != x.data_ptr() and kwargs["scale"].data_ptr() != scale.data_ptr()
    elsewhere = batch.own(batch.arguments(), torch.device("meta"))
    assert elsewhere[0][0].is_meta and elsewhere[1]["scale"].is_meta, "as DDP moves all there is"
    selected = batch.select([1])
    assert batch.own(selected, torch.device("cpu"))[0][0] is selected[0][0], "that is a copy already"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((object(), torch.zeros(2)), "a object"),
        ((torch.zeros(2, 2, requires_grad=True),), "needs a gradient"),
        ((torch.eye(2).to_sparse(),), "not a dense tensor"),
        ((3,), "no tensor with a batch dimension"),
    ],
)
def test_what_cannot_be_hashed_says_so(args, why):
    with pytest.raises(UnkeyableError, match=why):
        Keys().batch(args, {})


def test_a_part_of_a_batch():
    batch = Keys().batch((), text([3, 5, 9], 9))
    args, kwargs = batch.select([1, 0], length=5)
    assert args == ()
    assert kwargs["input_ids"].shape == (2, 5)
    assert batch.subset([1, 0]).lengths.tolist() == [5, 3]
    assert batch.subset([1, 0]).keys == [batch.keys[1], batch.keys[0]]
