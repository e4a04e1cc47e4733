"""A model's way from the trainer into a reference process, without its weights.

The structure travels by cloudpickle, so classes of the user's `__main__` come along by value; classes of importable
modules come by name, with `sys.path` and the working directory beside them. Weights do not: every parameter and buffer
is replaced by an empty one of the same kind, and is filled by the first snapshot. The pickle is therefore small, can be
kept for a reference that is started again, and a model on an accelerator arrives on the CPU.

What kgt_ddp has put onto the model (hooks, replaced `forward` or `train` methods) stays behind; the user's own hooks
travel, unless they cannot be pickled.

Not supported, and said in the error: models with `torch.nn.utils.parametrize` (torch refuses to pickle them), and
models that hold what cannot be pickled (locks, open files, process groups).
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections import OrderedDict
from typing import Any, BinaryIO

import cloudpickle
import torch
from torch import Tensor, nn

from kgt_ddp.reference.arena import named_tensors

OURS = "kgt_ddp"


def pickled_structure(module: nn.Module) -> bytes:
    """`module` without its weights; see the file. The module is not touched.

    Raises:
        ValueError: it cannot be pickled even without the user's hooks; the message says what stands in the way.
    """
    try:
        return _dump(module, keep_user_hooks=True)
    except Exception:
        try:
            return _dump(module, keep_user_hooks=False)
        except Exception as error:
            raise ValueError(f"{type(module).__name__} cannot be sent to a reference: {error}") from error


def model_from(structure: bytes) -> nn.Module:
    """The module of `pickled_structure`, its weights undefined.

    Raises:
        Exception: whatever the user's classes raise while they are imported and built.
    """
    module = pickle.loads(structure)
    if not isinstance(module, nn.Module):
        raise ValueError(f"a {type(module).__name__} instead of a model")
    return module


def surroundings() -> dict[str, Any]:
    """What by-name imports of a model's classes depend on; plain data."""
    return {"cwd": os.getcwd(), "sys_path": [entry for entry in sys.path if isinstance(entry, str)]}


def enter(surroundings: dict[str, Any]) -> None:
    """Make another process's by-name imports work here: missing `sys.path` entries go to the end, so that they can
    never replace what this process itself runs on."""
    try:
        os.chdir(surroundings["cwd"])
    except OSError:
        pass  # the directory may be gone; imports may work without it
    for entry in surroundings["sys_path"]:
        absolute = os.path.abspath(os.path.join(surroundings["cwd"], entry))
        if absolute not in sys.path:
            sys.path.append(absolute)


def _dump(module: nn.Module, *, keep_user_hooks: bool) -> bytes:
    file = io.BytesIO()
    _Pickler(file, module, keep_user_hooks=keep_user_hooks).dump(module)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    """Leaves weights, and what kgt_ddp has hung onto modules, out of the pickle."""

    def __init__(self, file: BinaryIO, module: nn.Module, *, keep_user_hooks: bool) -> None:
        super().__init__(file)
        self._weights = {id(tensor) for tensor in named_tensors(module).values()}
        self._keep_user_hooks = keep_user_hooks

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return self._reduce_tensor(obj)
        if isinstance(obj, nn.Module):
            reduced = obj.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
            if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):
                return (*reduced[:2], self._without_foreign(reduced[2]), *reduced[3:])
            return reduced
        return super().reducer_override(obj)

    def _reduce_tensor(self, tensor: Tensor) -> Any:
        if id(tensor) in self._weights and type(tensor) in (Tensor, nn.Parameter):
            parameter = type(tensor) is nn.Parameter
            return _empty, (tuple(tensor.shape), tensor.dtype, parameter, tensor.requires_grad)
        if tensor.device.type != "cpu":
            return _constant, (tensor.detach().cpu(),)
        if tensor.grad_fn is not None:
            return _constant, (tensor.detach(),)
        return NotImplemented

    def _without_foreign(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's `__dict__` without hooks and methods of ours (or, if asked, without anybody's hooks)."""
        kept = {}
        for name, value in state.items():
            if is_ours(value):
                continue
            if isinstance(value, OrderedDict) and value and all(isinstance(key, int) for key in value):
                # torch keeps hooks in ordered dictionaries by integer handle; no other entry of a module is one.
                value = OrderedDict(
                    (key, hook) for key, hook in value.items() if self._keep_user_hooks and not is_ours(hook)
                )
            kept[name] = value
        return kept


def is_ours(value: Any) -> bool:
    """Is this callable, or what it wraps, code of kgt_ddp? A module never is, whatever its class."""
    if isinstance(value, nn.Module) or not callable(value):
        return False
    for name in ("func", "__func__", "__wrapped__"):
        inner = getattr(value, name, None)
        if inner is not None and inner is not value and callable(inner) and is_ours(inner):
            return True
    home = getattr(value, "__module__", None) or type(value).__module__
    return isinstance(home, str) and (home == OURS or home.startswith(OURS + "."))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, parameter: bool, requires_grad: bool) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    return nn.Parameter(tensor, requires_grad=requires_grad) if parameter else tensor


def _constant(tensor: Tensor) -> Tensor:
    return tensor


def submodules(module: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Blocks by name.

    Raises:
        ValueError: a name that the model does not have.
    """
    found = dict(module.named_modules())
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"no module is called {', '.join(map(repr, missing))}")
    return {name: found[name] for name in names}
