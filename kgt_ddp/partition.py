"""Which modules of a model are its blocks: a search of the module tree, before anything has run.

The repeated units of a network (residual blocks, encoder layers) are the children of its outermost containers
(`ModuleList`, `Sequential`, `ModuleDict`); where there is none, the direct children are the units. Nothing inside a unit
is looked at, so that a `Sequential` shortcut inside a residual block is not taken for blocks.

An embedding in front of the repeated units that is as heavy as one of them is a unit of its own. Its gradient is dense, most of
it zeros, and costs its exchange and its optimizer step like any other: half of MiniLM's parameters, and three tenths of
the time of a step of its fine-tuning on two cores, are its embeddings. What they put out hardly moves in fine-tuning.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from kgt_ddp.errors import BlockError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_FEW = 4
"""Below this many units, a `Sequential` of plain layers is cut further."""


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper."""
    return getattr(module, "_orig_mod", module)


def unwrapped_name(name: str) -> str:
    """The name that a module of `torch.compile`'s wrapper has in the model inside."""
    return name.removeprefix("_orig_mod.")


def find_units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of each unit, in order of definition; a model without parts is one unit."""
    names = {id(m): n for n, m in model.named_modules()}
    root = unwrap(model)
    units = _expand(root, split_plain=False)
    if len(units) < _FEW:
        finer = _expand(root, split_plain=True)
        units = finer if len(finer) > len(units) else units
    return [(names[id(unit)], unit) for unit in units]


def find_tables(model: nn.Module, units: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """(name, module) of each embedding outside the units that has at least as many parameters as half of the units have.

    It is the outermost module that holds an `nn.Embedding` or `nn.EmbeddingBag` and no unit. One whose weight another module
    has too (a tied output layer) is left out: it trains as long as that module does. So is one that the user has frozen:
    nothing is left to save.
    """
    taken = {id(m) for _, unit in units for m in unit.modules()}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    enough = statistics.median(_num_parameters(unit) for _, unit in units) if units else 0
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        parts = {id(m) for m in module.modules()}
        if not parts.isdisjoint(taken) or not any(isinstance(m, _TABLES) for m in module.modules()):
            continue
        taken |= parts
        tied = any(owners[id(p)] - parts for p in module.parameters())
        trains = any(p.requires_grad for p in module.parameters())
        if trains and not tied and _num_parameters(module) >= enough:
            found.append((name, module))
    return found


def chosen_units(model: nn.Module, blocks: Sequence[str | nn.Module]) -> list[tuple[str, nn.Module]]:
    """The units that a user named.

    Raises:
        BlockError: not a module of this model, named twice, without parameters, or one inside the other.
    """
    by_name = dict(model.named_modules())
    names = {id(m): n for n, m in by_name.items()}
    chosen: list[tuple[str, nn.Module]] = []
    for item in blocks:
        if isinstance(item, str) and item not in by_name:
            close = [n for n in by_name if n.split(".")[-1] == item.split(".")[-1]][:5]
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise BlockError(f"blocks: the model has no module {item!r}{hint}")
        module = by_name[item] if isinstance(item, str) else item
        if id(module) not in names:
            raise BlockError(f"blocks: this {type(module).__name__} is no module of the model")
        if not _has_parameters(module):
            raise BlockError(f"blocks: {names[id(module)] or 'the model'!r} has no parameters to freeze")
        for name, other in chosen:
            if any(module is m for m in other.modules()) or any(other is m for m in module.modules()):
                raise BlockError(f"blocks: {names[id(module)]!r} and {name!r} overlap")
        chosen.append((names[id(module)], module))
    if not chosen:
        raise BlockError("blocks: the list is empty; leave it out to have blocks found")
    return chosen


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _parts(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if _has_parameters(child)]


def _is_container(module: nn.Module) -> bool:
    # Exact types: a subclass (a residual unit written as a Sequential) has a meaning of its own.
    return type(module) in _CONTAINERS


def _is_composite(module: nn.Module) -> bool:
    return bool(_parts(module))


def _repeats(module: nn.Module) -> bool:
    """A container of units, as against a container of the layers of one unit."""
    parts = _parts(module)
    return _is_container(module) and len(parts) >= 2 and any(_is_composite(part) for part in parts)


def _expand(root: nn.Module, *, split_plain: bool) -> list[nn.Module]:
    """Units below `root`; `split_plain` cuts containers of plain layers too."""
    cuts = _is_container if split_plain else _repeats
    if cuts(root) or any(cuts(m) for m in _outer_modules(root)):
        return _units_below(root, cuts)
    return _parts(root) or ([root] if _has_parameters(root) else [])


def _outer_modules(module: nn.Module) -> Iterable[nn.Module]:
    yield module
    for part in _parts(module):
        yield from _outer_modules(part)


def _units_below(module: nn.Module, cuts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    if cuts(module):
        return _units_of_container(module, cuts)
    found = [part for part in _parts(module) if any(cuts(m) for m in _outer_modules(part))]
    return [unit for part in found for unit in _units_below(part, cuts)]


def _units_of_container(container: nn.Module, cuts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """A container of containers (stages of layers) is cut down to the layers, also where a stage has only one."""
    units: list[nn.Module] = []
    for part in _parts(container):
        nested = cuts(part) or (_is_container(part) and any(_is_composite(p) for p in _parts(part)))
        units += _units_of_container(part, cuts) if nested else [part]
    return units
