from __future__ import annotations

import pytest
import torch

from benchmarks import scaling_worker
from benchmarks.scaling_model import Row


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(scaling_worker.EXAMPLES))
    return pytest.importorskip("minilm_newsgroups")


def shapes(net):
    return {name: (parameter.shape, parameter.requires_grad) for name, parameter in net.named_parameters()}


def test_minilm_has_12_layers_and_random_weights_without_those_of_scripts_data(examples, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setenv("KGTRUN_LANGUAGE_DIR", str(tmp_path))
    assert scaling_worker.language_folder() is None
    net, loss = scaling_worker.minilm()
    assert len(net.encoder.encoder.layer) == 12 and net.encoder.training
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(33.2e6, rel=0.01)
    assert loss(net).requires_grad
    monkeypatch.delenv("KGTRUN_LANGUAGE_DIR")
    if scaling_worker.language_folder() is None:
        pytest.skip("scripts/data language has not been run")
    pretrained, _ = scaling_worker.minilm()
    assert shapes(pretrained) == shapes(net) and pretrained.encoder.training
    layers = pretrained.encoder.encoder.layer
    for first, again in zip(layers[:6], layers[6:], strict=True):
        for p, q in zip(first.parameters(), again.parameters(), strict=True):
            assert p is not q and torch.equal(p, q)


def test_a_profile_holds_medians_and_the_gradients_in_order_of_readiness():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1, bias=False))
    net[0].bias.requires_grad_(False)
    rows = [Row(forward_s=s, backward_s=2 * s, optimizer_s=3 * s, ready_s=(0.5 * s, 0.1 * s)) for s in (1.0, 2.0, 9.0)]
    assert scaling_worker.profile(net, rows) == {
        **{"forward_s": 2.0, "backward_s": 4.0, "optimizer_s": 6.0},
        "gradients": [(0.2, 12), (1.0, 24)],
    }
