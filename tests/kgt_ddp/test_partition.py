from __future__ import annotations

import pytest
import torch
from torch import nn

from kgt_ddp.blocks import Blocks
from kgt_ddp.errors import BlockError
from kgt_ddp.execution_order import watch
from kgt_ddp.partition import chosen_units, find_tables, find_units
from tests.kgt_ddp.networks import (
    EncoderDecoder,
    Layer,
    Residual,
    SmallResNet,
    SmallViT,
    TiedLanguageModel,
    small_bert,
)


def units(model):
    return [name for name, _ in find_units(model)]


def ordered(model, *inputs, **kwargs):
    blocks = Blocks(model)
    with watch(model) as order:
        model(*inputs, **kwargs)
    blocks.order_by(order)
    return blocks


def parameters_of(block):
    return [name for name, _ in block.parameters]


def assert_partition(model, blocks):
    everything = [name for block in blocks.blocks for name in parameters_of(block)]
    assert sorted(everything) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (SmallResNet(), ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        (SmallViT(), ["blocks.0", "blocks.1", "blocks.2"]),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)), ["0", "3"]),
        (nn.Linear(3, 3), [""]),
        (
            nn.ModuleDict({"stages": nn.ModuleList([nn.ModuleList([Layer(4), Layer(4)]), nn.ModuleList([Layer(4)])])}),
            ["stages.0.0", "stages.0.1", "stages.1.0"],
        ),
        (
            nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
            ["0", "1"],
        ),
    ],
)
def test_units_are_the_children_of_the_outermost_containers(model, expected):
    assert units(model) == expected


def test_a_shortcut_inside_a_unit_is_not_taken_for_units():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.shortcut = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Sequential(nn.BatchNorm2d(2)))

    model = nn.Module()
    model.layer1 = nn.Sequential(Unit(), Unit())
    model.layer2 = nn.Sequential(Unit(), Unit())
    assert units(model) == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]


def test_a_network_without_containers_is_cut_into_its_children():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)
            self.fc1, self.fc2 = nn.Linear(2, 2), nn.Linear(2, 2)

    assert units(Net()) == ["conv1", "conv2", "fc1", "fc2"]


def test_hugging_face_bert_is_cut_into_its_layers():
    pytest.importorskip("transformers")
    model = small_bert(layers=5)
    blocks = ordered(model, input_ids=torch.ones(2, 4, dtype=torch.long), attention_mask=torch.ones(2, 4))
    assert [block.name for block in blocks.blocks[:2]] == ["bert.embeddings", "bert.encoder.layer.0"]
    assert len(blocks) == 7
    assert all(n.startswith("bert.embeddings") for n in parameters_of(blocks[0]))
    assert all(n.startswith(("bert.pooler", "classifier")) for n in parameters_of(blocks[6]))
    assert_partition(model, blocks)


@pytest.mark.parametrize(("vocabulary", "heavy"), [(16, False), (1_000, True)])
def test_an_embedding_as_heavy_as_a_layer_is_a_block_of_its_own(vocabulary, heavy):
    model = EncoderDecoder(vocabulary=vocabulary)
    ids = torch.ones(2, 5, dtype=torch.long)
    names = [block.name for block in ordered(model, ids, ids).blocks]
    # Both are looked up in front of the encoder.
    assert names[:2] == (["source", "target"] if heavy else [f"transformer.encoder.layers.{i}" for i in range(2)])


def test_an_embedding_that_the_user_froze_is_none():
    model = EncoderDecoder(vocabulary=1_000)
    model.source.requires_grad_(False)
    assert [name for name, _ in find_tables(model, find_units(model))] == ["target"]


def test_a_tied_embedding_is_none_and_neither_is_one_behind_other_blocks():
    tied = TiedLanguageModel(vocabulary=5_000)
    assert ordered(tied, torch.ones(2, 5, dtype=torch.long))[0].name == "layers.0"

    class LateTable(SmallResNet):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10_000, 5)

        def forward(self, x):
            return super().forward(x) + self.table(torch.zeros(len(x), dtype=torch.long))

    blocks = ordered(LateTable(), torch.randn(2, 1, 8, 8))
    assert [block.name for block in blocks.blocks] == [*(f"blocks.{i}" for i in range(4)), "head"]
    assert "table.weight" in parameters_of(blocks[4])


def test_a_bag_with_a_layer_behind_it_is_one_block():
    class Front(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(1_000, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, ids):
            return self.norm(self.bag(ids))

    model = nn.Sequential()
    model.front, model.layers = Front(), nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    ids = torch.ones(2, 5, dtype=torch.long)
    assert [name for name, _ in find_tables(model, [("layers.0", model.layers[0])])] == ["front"]
    assert_partition(model, ordered(model, ids))


def test_strays_join_the_first_block_executed_after_their_use():
    model = SmallViT()
    blocks = ordered(model, torch.randn(2, 1, 8, 8))
    assert_partition(model, blocks)
    front = parameters_of(blocks[0])
    assert {"cls_token", "pos_embed", "patch_embed.weight"} <= set(front)
    head = parameters_of(blocks[-1])
    assert {"head_scale", "norm.weight", "head.weight"} <= set(head)
    assert model.embed_drop in blocks[0].modules, "dropout in front of a frozen block would keep drawing"


def test_blocks_follow_the_order_of_execution_not_of_definition():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Residual(1) for _ in range(4)])

        def forward(self, x):
            for part in reversed(self.parts):
                x = part(x)
            return x

    model = Reversed()
    blocks = Blocks(model)
    assert [b.name for b in blocks.blocks][0] == "parts.0"
    blocks = ordered(model, torch.randn(1, 1, 4, 4))
    assert [b.name for b in blocks.blocks] == ["parts.3", "parts.2", "parts.1", "parts.0"]


def test_a_unit_that_did_not_run_stands_last():
    class Skips(SmallResNet):
        def forward(self, x):
            return self.head(self.blocks[2](self.blocks[0](self.stem(x))).mean((2, 3)))

    blocks = ordered(Skips(), torch.randn(1, 1, 8, 8))
    assert [b.name for b in blocks.blocks] == ["blocks.0", "blocks.2", "blocks.1", "blocks.3", "head"]


def test_encoder_and_decoder_in_order_with_their_own_embeddings():
    model = EncoderDecoder(depth=2)
    ids = torch.ones(2, 5, dtype=torch.long)
    blocks = ordered(model, ids, ids)
    assert_partition(model, blocks)
    assert [b.name for b in blocks.blocks[:4]] == [
        "transformer.encoder.layers.0",
        "transformer.encoder.layers.1",
        "transformer.decoder.layers.0",
        "transformer.decoder.layers.1",
    ]
    # The decoder's embedding is looked up before the encoder runs: frozen any later it would keep no node in front alive,
    # but its time of use decides.
    assert "source.weight" in parameters_of(blocks[0])
    assert "transformer.encoder.norm.weight" in parameters_of(blocks[2])


def test_tied_weights_are_shared_with_their_last_user():
    model = TiedLanguageModel()
    blocks = ordered(model, torch.ones(2, 5, dtype=torch.long))
    assert_partition(model, blocks)
    assert blocks[0].shared == {"embedding.weight": 3}
    blocks.move_to(2)
    assert model.embedding.weight.requires_grad
    assert "embedding.weight" in blocks.shared_in_prefix() and blocks.num_fixed == 0
    assert not model.layers[0].mlp[0].weight.requires_grad
    model.embedding.requires_grad_(False)
    by_hand = ordered(model, torch.ones(2, 5, dtype=torch.long))
    by_hand.move_to(2)
    assert by_hand.shared_in_prefix() == [] and by_hand.num_fixed == 2


def test_what_the_user_freezes_later_stays_frozen_when_its_block_is_lifted():
    model = SmallViT()
    blocks = ordered(model, torch.randn(2, 1, 8, 8))
    own = blocks[0].parameters[0][1].requires_grad_(False)
    blocks.move_to(2)
    assert own in {*blocks.frozen_parameters()} and blocks.resting() == []
    blocks.move_to(0)
    assert not own.requires_grad and all(p.requires_grad for _, p in blocks[0].parameters[1:])
    assert blocks.resting() == [own]
    blocks.move_to(1)
    own.requires_grad_(True)  # and turns on again
    blocks.move_to(2)
    blocks.move_to(0)
    assert own.requires_grad and blocks.resting() == []


def test_watching_leaves_nothing_behind_and_changes_nothing():
    model = SmallViT()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    x = torch.randn(2, 1, 8, 8)
    torch.manual_seed(0)
    plain = model(x)
    torch.manual_seed(0)
    with watch(model):
        watched = model(x)
    assert torch.equal(plain, watched)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_chosen_blocks_by_name_and_by_module():
    model = SmallResNet()
    names = [n for n, _ in chosen_units(model, ["stem", model.blocks[0], "head"])]
    assert names == ["stem", "blocks.0", "head"]


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (["block.0"], "no module 'block.0'.*blocks.0"),
        ([nn.Linear(1, 1)], "no module of the model"),
        (["blocks.0", "blocks.0.conv"], "overlap"),
        (["blocks.0.drop"], "no parameters"),
        ([], "empty"),
    ],
)
def test_wrong_blocks_are_refused_with_what_would_be_valid(blocks, says):
    with pytest.raises(BlockError, match=says):
        Blocks(SmallResNet(), blocks)


def test_describe_names_every_block_its_strays_and_its_state():
    model = SmallViT()
    blocks = ordered(model, torch.randn(2, 1, 8, 8))
    blocks.move_to(1)
    table = blocks.describe().splitlines()
    assert len(table) == 5
    assert "frozen" in table[1]
    assert "cls_token" in table[1]
    assert "last" in table[-1]


def test_the_partition_survives_its_state_dict_and_refuses_another_model():
    model = SmallViT()
    blocks = ordered(model, torch.randn(2, 1, 8, 8))
    again = Blocks(SmallViT())
    again.load_state_dict(blocks.state_dict())
    assert again.fingerprint() == blocks.fingerprint()
    with pytest.raises(BlockError, match="another model"):
        Blocks(SmallResNet()).load_state_dict(blocks.state_dict())
