from __future__ import annotations

import importlib
import inspect

import pytest

from launcher import torch_private


@pytest.mark.parametrize("name", torch_private.NAMES)
def test_each_private_name_exists(name):
    module, _, path = name.partition(":")
    owner, _, attribute = path.rpartition(".")
    found = getattr(importlib.import_module(module), owner)
    assert hasattr(found, attribute) or f"self.{attribute}" in inspect.getsource(found.__init__), f"{name} is gone"
