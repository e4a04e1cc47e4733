"""The model as an ordered partition of all its parameters into blocks that freeze as wholes, from the front.

Order is order of execution, learned from one forward (`execution_order`). The units of the module tree (`partition`) are
the cores of the blocks, and so are heavy embeddings that run in front of them all; every stray (`cls_token`, `pos_embed`, a
light embedding, the stem, a final norm) joins the first block that is executed after its use, so that no backward node runs in
front of the frontier. Strays used after the last unit form the block `head`. The last block always trains.

A parameter that a later block uses too (tied embeddings) is *shared*: it belongs to its first block but stays trainable
until its last user is frozen. A prefix with such a parameter is not bit-identical while frozen, and says so.

This module sets `requires_grad`, `.grad` and the training flag; it issues no collectives and knows no DDP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kgt_ddp.errors import BlockError
from kgt_ddp.execution_order import ExecutionOrder
from kgt_ddp.partition import chosen_units, find_tables, find_units


@dataclass(eq=False)
class Block:
    """One freezable piece of the model."""

    name: str
    unit: nn.Module | None
    """The module at its core; None for the head, which is strays only."""
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    """Every module that belongs to it, strays included: these go to eval mode."""
    buffers: list[str] = field(default_factory=list)
    """Qualified names of its buffers."""
    shared: dict[str, int] = field(default_factory=dict)
    """Parameter name -> index of the last block that uses it too."""

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for _, p in self.parameters)


class Blocks:
    """The partition of one model; see the module docstring.

    Args:
        model: what DDP wraps (not the wrapper).
        chosen: units named by the user, as modules or qualified names; None to find them.

    Attributes:
        model: as given.

    Raises:
        BlockError: `chosen` does not fit the model.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[str | nn.Module] | None = None) -> None:
        self.model = model
        self._units = chosen_units(model, chosen) if chosen is not None else find_units(model)
        self._tables = [] if chosen is not None else find_tables(model, self._units)
        self._user_frozen = {id(p) for p in model.parameters() if not p.requires_grad}
        self._resting: set[int] = set()
        """Those that the user has turned off since, and may turn on again. DDP allows it if it is to find unused parameters."""
        self._was_training: dict[nn.Module, bool] = {}
        self.frontier = 0
        self.ordered = False
        """Whether the order of execution is known; before, the order of definition stands in."""
        self.blocks: list[Block] = []
        self._assign(None)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index]

    def order_by(self, order: ExecutionOrder) -> None:
        """Take the order of execution from a watched forward and place the strays by it."""
        if self.frontier:
            raise ValueError("the blocks cannot be ordered again while some are frozen")
        self._assign(order)
        self.ordered = True

    # ---- the partition ----------------------------------------------------------------------------------------------

    def _assign(self, order: ExecutionOrder | None) -> None:
        found = [*_in_front(self._tables, self._units, order), *self._units]
        places = _Timeline(found, order)
        units = [found[i] for i in places.sequence]
        blocks = [Block(name or type(unit).__name__, unit) for name, unit in units]
        head = Block("head", None)
        everyone = [*blocks, head]
        inside = {id(m): index for index, (_, unit) in enumerate(units) for m in unit.modules()}
        seen: set[int] = set()
        # Owners are walked in order of definition; what matters is only which block each thing lands in.
        for module_name, module in self.model.named_modules():
            prefix = f"{module_name}." if module_name else ""
            home = inside.get(id(module), places.of_module(module, order))
            if home is not None:
                everyone[home].modules.append(module)
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                users = places.users(parameter, module, order)
                first = inside.get(id(module), min(users) if users else (home if home is not None else len(blocks)))
                first = min([first, *users])
                everyone[first].parameters.append((prefix + name, parameter))
                if users and max(users) > first:
                    everyone[first].shared[prefix + name] = max(users)
            for name, _ in module.named_buffers(recurse=False):
                if home is not None:
                    everyone[home].buffers.append(prefix + name)
        # A head without parameters of its own still trains if it uses one of a block in front (a tied output layer).
        head_trains = head.parameters or any(last == len(blocks) for b in blocks for last in b.shared.values())
        if not head_trains and blocks:
            blocks[-1].modules += head.modules
            blocks[-1].buffers += head.buffers
            everyone = blocks
        self.blocks = everyone

    def state_dict(self) -> list[dict[str, Any]]:
        """The partition by names, so that a resumed job needs no forward to learn it."""
        names = {id(m): n for n, m in self.model.named_modules()}
        return [
            {
                "name": block.name,
                "unit": None if block.unit is None else names[id(block.unit)],
                "parameters": [n for n, _ in block.parameters],
                "modules": [names[id(m)] for m in block.modules],
                "buffers": list(block.buffers),
                "shared": dict(block.shared),
            }
            for block in self.blocks
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take over a partition.

        Raises:
            BlockError: it is that of another model.
        """
        modules, parameters = dict(self.model.named_modules()), dict(self.model.named_parameters())
        saved = [n for entry in state for n in entry["parameters"]]
        if sorted(saved) != sorted(parameters) or any(n not in modules for entry in state for n in entry["modules"]):
            odd = sorted(set(saved) ^ set(parameters))
            raise BlockError(
                f"the saved blocks are those of another model: they differ in {_summary(odd) or 'modules'}"
            )
        self.blocks = [
            Block(
                name=entry["name"],
                unit=None if entry["unit"] is None else modules[entry["unit"]],
                parameters=[(n, parameters[n]) for n in entry["parameters"]],
                modules=[modules[n] for n in entry["modules"]],
                buffers=list(entry["buffers"]),
                shared=dict(entry["shared"]),
            )
            for entry in state
        ]
        self.ordered = True

    def fingerprint(self) -> str:
        """Equal on all ranks that cut the same model in the same way."""
        text = "\n".join(f"{b.name} {[n for n, _ in b.parameters]}" for b in self.blocks)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """The partition as a table."""
        lines = [f"{'block':>5}  {'parameters':>11}  {'state':7}  unit"]
        for index, block in enumerate(self.blocks):
            state = "frozen" if index < self.frontier else ("active" if index < len(self) - 1 else "last")
            strays = [n for n, _ in block.parameters if block.unit is None or not n.startswith(block.name + ".")]
            notes = f"  with {_summary(strays)}" if strays and block.unit is not None else ""
            notes += f"  shared: {_summary(list(block.shared))}" if block.shared else ""
            lines.append(f"{index:>5}  {block.num_parameters:>11,}  {state:7}  {block.name}{notes}")
        if not self.ordered:
            lines.append("(in order of definition; the order of execution is learned in the first training forward)")
        return "\n".join(lines)

    # ---- freezing ---------------------------------------------------------------------------------------------------

    @property
    def max_frontier(self) -> int:
        """How many blocks may be frozen: something that the user has not frozen must be left to train."""
        trains = [
            block.shared.get(name, index)
            for index, block in enumerate(self.blocks)
            for name, p in block.parameters
            if id(p) not in self._user_frozen
        ]
        return max(trains, default=0)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that do not train because of the frontier (not those that the user froze)."""
        return list(self._parameters_at(self.frontier).values())

    def tensors_at(self, frontier: int) -> dict[str, torch.Tensor]:
        """Parameters and buffers, by qualified name, that stand still because of a frontier there."""
        names = {name for block in self.blocks[:frontier] for name in block.buffers}
        return {**self._parameters_at(frontier), **{n: b for n, b in self.model.named_buffers() if n in names}}

    def _parameters_at(self, frontier: int) -> dict[str, nn.Parameter]:
        return {
            name: p
            for index, block in enumerate(self.blocks[:frontier])
            for name, p in block.parameters
            if id(p) not in self._user_frozen and block.shared.get(name, index) < frontier
        }

    def shared_in_prefix(self) -> list[str]:
        """Names of parameters in the frozen prefix that still train through an active block; not those that the user froze."""
        return [name for block in self.blocks[: self.frontier] for name in self._still_train(block)]

    @property
    def num_fixed(self) -> int:
        """Front blocks whose output cannot change: the frozen ones in front of the first with such a parameter."""
        for index, block in enumerate(self.blocks[: self.frontier]):
            if self._still_train(block):
                return index
        return self.frontier

    def _still_train(self, block: Block) -> list[str]:
        """Names of its parameters that an active block trains, too."""
        return [
            name
            for name, p in block.parameters
            if block.shared.get(name, -1) >= self.frontier and id(p) not in self._user_frozen
        ]

    @property
    def any_trains(self) -> bool:
        """Whether anything does now: the user may have turned all off for a while (a discriminator in its generator's step)."""
        return any(p.requires_grad for block in reversed(self.blocks) for _, p in block.parameters)

    def resting(self) -> list[nn.Parameter]:
        """Parameters behind the frontier that the user has turned off since the model was wrapped."""
        frozen = {id(p) for p in self.frozen_parameters()}
        return [p for p in self.model.parameters() if id(p) in self._resting - frozen]

    def frozen_buffers(self) -> list[str]:
        return [name for block in self.blocks[: self.frontier] for name in block.buffers]

    def buffers_between(self, start: int, stop: int) -> list[torch.Tensor]:
        """The buffers of blocks [start, stop)."""
        names = {name for block in self.blocks[start:stop] for name in block.buffers}
        return [b for n, b in self.model.named_buffers() if n in names]

    def move_to(self, frontier: int) -> None:
        """Freeze or lift blocks so that the first `frontier` are frozen."""
        if not 0 <= frontier <= self.max_frontier:
            raise ValueError(f"frontier {frontier} is out of range 0 to {self.max_frontier}")
        before = {id(p) for p in self.frozen_parameters()}
        off = {id(p) for p in self.model.parameters() if not p.requires_grad}
        self._resting = (self._resting & before & off) | (off - before - self._user_frozen)
        old, self.frontier = self.frontier, frontier
        after = self.frozen_parameters()
        frozen = {id(p) for p in after}
        for parameter in after:
            parameter.requires_grad_(False)
            parameter.grad = None
        for block in self.blocks[:old]:
            for _, parameter in block.parameters:
                if id(parameter) in before and id(parameter) not in frozen | self._resting:
                    parameter.requires_grad_(True)
        for block in self.blocks[frontier:old]:
            for module in block.modules:
                module.training = self._was_training.pop(module, module.training)
        for block in self.blocks[old:frontier]:
            for module in block.modules:
                self._was_training[module] = module.training
        self.hold_eval()

    def hold_eval(self) -> None:
        """Keep frozen modules in eval mode, whatever `train()` a parent has had since. Costs microseconds."""
        for module in self._was_training:
            if module.training:
                module.training = False

    def training_was_set(self) -> None:
        """The model's mode was set as a whole: lifted modules return to what that made of them. (A model's own `train` may
        keep some in eval mode.)"""
        for module in self._was_training:
            self._was_training[module] = module.training


class _Timeline:
    """Where in the sequence of blocks a module or a parameter is used."""

    def __init__(self, units: Sequence[tuple[str, nn.Module]], order: ExecutionOrder | None) -> None:
        self._intervals: list[tuple[int, int]] = []
        if order is None:
            self.sequence = list(range(len(units)))
            return
        spans = [_interval(unit, order) for _, unit in units]
        # A unit that did not run stands behind all that did, in order of definition: it is never frozen before them.
        late = max((end for span in spans if span for _, end in [span]), default=0) + 1
        key = [span[0] if span else late for span in spans]
        self.sequence = sorted(range(len(units)), key=lambda i: (key[i], i))
        self._intervals = [spans[i] or (late, late) for i in self.sequence]

    def at(self, time: int) -> int:
        """Index of the block that runs at `time`, or of the first one after it; one past the last: the head."""
        for index, (start, end) in enumerate(self._intervals):
            if time < start or start <= time <= end:
                return index
        return len(self._intervals)

    def of_module(self, module: nn.Module, order: ExecutionOrder | None) -> int | None:
        """Block of a module outside every unit; None if it contains units, never ran, or serves several blocks."""
        if order is None:
            return None
        homes = set()
        for start, end in order.calls.get(id(module), []):
            if any(start < s and e < end for s, e in self._intervals):
                return None
            homes.add(self.at(start))
        return homes.pop() if len(homes) == 1 else None

    def users(self, parameter: nn.Parameter, owner: nn.Module, order: ExecutionOrder | None) -> list[int]:
        """Blocks that use a parameter."""
        if order is None:
            return []
        times = order.uses.get(id(parameter))
        if times is None:  # no use was seen: its owner's calls stand in, unless the owner is a parent of the units
            home = self.of_module(owner, order)
            return [] if home is None else [home]
        return sorted({self.at(time) for time in times})


def _in_front(
    tables: Sequence[tuple[str, nn.Module]], units: Sequence[tuple[str, nn.Module]], order: ExecutionOrder | None
) -> list[tuple[str, nn.Module]]:
    """Those of the tables that run before all units; before a forward was watched, all. What a table puts out says nothing
    about units in front of it, which would be frozen with it: a decoder's is left a stray."""
    if order is None:
        return list(tables)
    first = min((span[0] for _, unit in units if (span := _interval(unit, order))), default=0)
    return [table for table in tables if (span := _interval(table[1], order)) and span[1] < first]


def _interval(unit: nn.Module, order: ExecutionOrder) -> tuple[int, int] | None:
    """From the start of a unit's first call to the end of the last; by its inner modules if it is never called itself."""
    calls = order.calls.get(id(unit), [])
    if not calls:
        calls = [call for m in unit.modules() for call in order.calls.get(id(m), [])]
    return (min(s for s, _ in calls), max(e for _, e in calls)) if calls else None


def _summary(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
