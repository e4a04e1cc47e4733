"""The frozen prefix as the cache sees it: what is skipped, what speaks against it, and whose outputs these are.

`Prefix` is made for one cut: the frontier, or one in front of it when the frontier has moved on (`recut`). Its *parts* are
the modules that need not compute: the units of the blocks in front of the cut and, in front of them, the outermost strays (a
stem, embeddings). The last unit is the *frontier unit*, whose output is cached.

`digest` names everything that the output depends on besides the sample: weights and buffers (those of modules around the
blocks, too), the block table, the modules' settings and source code, torch's version. `changed` tells cheaply whether
weights were written since, by version counters and addresses (torch counts every write in place; what is written through
`.data` escapes it, and the cache's spot checks are for that).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
import xxhash
from torch import nn

from kgt_ddp.activation_cache import torch_private
from kgt_ddp.blocks import Block, Blocks

FORMAT = 2
"""Counted up when keys or records are made in another way."""
COMPILED = "the model is compiled"
_OUR_HOOKS = "kgt_ddp."
_EDGE = "kgt_ddp.prefix_edge"
_PASSES_ON = ("transformers.modeling_layers", "GradientCheckpointingLayer")
"""A class whose `__call__`, in releases of transformers that have one (5.17 has, 5.23 has not), ends in `nn.Module`'s: it
checkpoints while the layer is in training mode, which a frozen one is not."""


class Prefix:
    """See the module docstring.

    Args:
        model: what DDP wraps.
        blocks: its partition; the prefix is what lies in front of its frontier now.
    """

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self._model = model
        self.cut = blocks.frontier
        self.blocks: list[Block] = list(blocks.blocks[: self.cut])
        self._shared = blocks.shared_in_prefix()
        self._names = {id(m): n or type(m).__name__ for n, m in model.named_modules()}
        self.unit = self.blocks[-1].unit if self.blocks else None
        self.parts: dict[nn.Module, str] = {}
        """Module -> the block it belongs to, by name; strays in front, then units."""
        for block in self.blocks:
            self._add_strays(block)
        for block in self.blocks:
            if block.unit is not None:
                self.parts[block.unit] = block.name
        names = {id(m): n for n, m in model.named_modules()}
        wanted = {n for block in self.blocks for n, _ in block.parameters}
        buffers = {n for block in self.blocks for n in block.buffers}
        self._tensors: list[tuple[str, torch.Tensor]] = [(n, p) for n, p in model.named_parameters() if n in wanted]
        elsewhere = {n for block in blocks.blocks for n in block.buffers}
        # A buffer of a module around the blocks may be read in front of them as well as behind: nobody can tell.
        self._tensors += [(n, t) for n, t in model.named_buffers() if n in buffers or n not in elsewhere]
        self._inside = [m for block in self.blocks for m in self._modules_of(block)]
        self._table = [(b.name, [n for n, _ in b.parameters], [names[id(m)] for m in b.modules]) for b in self.blocks]
        self._marks = self._versions()

    def name_of(self, module: nn.Module) -> str:
        return self._names[id(module)]

    def is_stray(self, module: nn.Module) -> bool:
        return all(block.unit is not module for block in self.blocks)

    def objection(self) -> str | None:
        """Why this prefix cannot be cached, as far as it shows without running it."""
        if self.unit is None:
            return "the last frozen block is no module"
        if self._shared:
            return (
                f"{self._shared[0]} in block {self._owner(self._shared[0])} still trains: an active block uses it too"
            )
        if any(torch_private.is_compiled(module) for module in [self._model, *self._inside]):
            return COMPILED
        for module in self._inside:
            if not _called_as_usual(module):
                return f"{self.name_of(module)} is not called as other modules are"
        return self.hooked()

    def hooked(self) -> str | None:
        """A hook on a module of the prefix would not see what it was made for. Costs microseconds."""
        for module in self._inside:
            for hook in torch_private.hooks(module):
                if not str(getattr(hook, "__module__", "")).startswith(_OUR_HOOKS):
                    return f"block {self._block_of(module)} has a hook on {self.name_of(module)}"
        return None

    def observed(self) -> bool:
        """Whether hooks of ours look at outputs in the prefix just now: this forward is to compute them."""
        return any(getattr(hook, "__module__", "") != _EDGE for m in self._inside for hook in torch_private.hooks(m))

    def changed(self) -> bool:
        """Whether weights or buffers were written since the last call (or since this was made)."""
        marks = self._versions()
        if marks == self._marks:
            return False
        self._marks = marks
        return True

    def digest(self) -> str:
        """See the module docstring; 32 hex digits. Reads all weights of the prefix once."""
        state = xxhash.xxh3_128(f"{FORMAT}{torch.__version__}{self.cut}{self._table}".encode())
        for module in [self._model, *self._inside]:
            state.update(f"{type(module).__module__}.{type(module).__qualname__}".encode())
            state.update(_source(type(module)).encode())
        for module in self._inside:
            state.update(repr(module).encode())
        for name, tensor in self._tensors:
            state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
        return state.hexdigest()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _add_strays(self, block: Block) -> None:
        units = {id(m) for b in self.blocks if b.unit is not None for m in b.unit.modules()}
        strays = [m for m in block.modules if id(m) not in units]
        inner = {id(child) for m in strays for child in m.modules() if child is not m}
        self.parts.update({m: block.name for m in strays if id(m) not in inner})

    def _modules_of(self, block: Block) -> Iterator[nn.Module]:
        seen = set()
        for module in [*block.modules, *(block.unit.modules() if block.unit is not None else ())]:
            if id(module) not in seen:
                seen.add(id(module))
                yield module

    def _block_of(self, module: nn.Module) -> str:
        return next(b.name for b in self.blocks if any(m is module for m in self._modules_of(b)))

    def _owner(self, parameter: str) -> str:
        return next(b.name for b in self.blocks if any(n == parameter for n, _ in b.parameters))

    def _versions(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), torch_private.writes(t)) for _, t in self._tensors]


def _called_as_usual(module: nn.Module) -> bool:
    """Whether a call of the module is one of its `forward`, which the cache may stand in for."""
    caller = next(kind for kind in type(module).__mro__ if "__call__" in vars(kind))
    return caller is nn.Module or (caller.__module__, caller.__qualname__) == _PASSES_ON


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""  # defined without a file (in a shell, by exec): its name has to do
