"""Makes the stock DistributedDataParallel freeze-aware, whatever the import order, without importing torch.

`DDP.__new__` returns a FreezeAwareDDP when the class asked for is DDP itself; a user's subclass stays what it is.
Python then calls that object's own `__init__` with the same arguments, because its class derives from the one asked
for. The name DDP keeps its meaning: `isinstance` holds, state dicts are torch's.

The hook is a finder in front of the import system that waits for one module; when torch is there already, the class is
changed at once. Without `kgt_ddp.ddp` DDP stays stock and one line says so.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "torch.nn.parallel.distributed"


def patch(module: ModuleType, root: str) -> None:
    """Give the module's DistributedDataParallel its `__new__`; a second call does nothing."""
    stock = module.DistributedDataParallel
    if "__new__" in vars(stock):
        return

    def __new__(cls, *args, **kwargs):
        return object.__new__(_freeze_aware(root) or cls if cls is stock else cls)

    stock.__new__ = __new__


def _freeze_aware(root: str) -> type | None:
    """FreezeAwareDDP, imported on first use; None, said once, when it cannot be."""
    if root not in sys.path:
        sys.path.append(root)
    try:
        from kgt_ddp.ddp import FreezeAwareDDP
    except ImportError as error:
        global _said
        if not _said:
            _said = True
            print(f"kgtrun: DistributedDataParallel stays stock: {error}", file=sys.stderr)
        return None
    return FreezeAwareDDP


_said = False


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TARGET by everyone else's means and patches it once it has run."""

    def __init__(self, root: str) -> None:
        self._root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run, root = spec.loader.exec_module, self._root

        def exec_module(module: ModuleType) -> None:
            run(module)
            patch(module, root)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(root: str) -> None:
    """Patch now if torch is there, otherwise when it comes. `root` is where our packages lie."""
    if TARGET in sys.modules:
        patch(sys.modules[TARGET], root)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(root))
