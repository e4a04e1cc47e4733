"""Every private name that the cache uses exists in this torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kgt_ddp.activation_cache import torch_private


@pytest.mark.parametrize("name", list(torch_private.PRIVATE_NAMES))
def test_every_private_name_exists(name):
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)


@pytest.mark.parametrize("name", list(torch_private.PRIVATE_ATTRIBUTES))
def test_every_private_attribute_of_modules_exists(name):
    assert hasattr(nn.Linear(1, 1), name)


def test_compiled_modules_are_known():
    module = nn.Linear(1, 1)
    assert not torch_private.is_compiled(module)
    assert torch_private.is_compiled(torch.compile(module, backend="eager"))
    module.compile(backend="eager")
    assert torch_private.is_compiled(module)


def test_a_compiled_forward_is_known_and_one_that_is_kept_from_it_is_no_such_thing():
    class Compiled(nn.Linear):
        forward = torch.compile(nn.Linear.forward, backend="eager")

    class Disabled(nn.Linear):
        forward = torch.compiler.disable(nn.Linear.forward)

    module = nn.Linear(1, 1)
    module.forward = torch.compile(module.forward, backend="eager")
    assert torch_private.is_compiled(module)
    assert torch_private.is_compiled(Compiled(1, 1))
    assert not torch_private.is_compiled(Disabled(1, 1))


def test_what_is_called_by_compiled_code_can_tell():
    seen = []

    def note(x):
        seen.append(torch_private.under_compilation())
        return x + 1

    @torch.compiler.disable
    def guarded(x):
        return note(x)

    def breaks(x):
        return note(guarded(note(x)))

    x = torch.zeros(2)
    note(x)
    torch.compile(note, backend="eager", fullgraph=True)(x)
    torch.compile(breaks, backend="eager")(x)
    assert seen == [False, True, True, False, True]


def test_writes_in_place_are_counted():
    tensor = torch.zeros(2)
    before = torch_private.writes(tensor)
    tensor.add_(1)
    assert torch_private.writes(tensor) > before
