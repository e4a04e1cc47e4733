"""The running mean of the weights of the blocks that still train: where a block is put as it freezes.

Under a high learning rate a block jitters about a point, and a falling rate would lead it there. A block that is frozen
before that stays where it happens to be; its mean over the last stretch of training is near that point (Polyak and Juditsky
1992; for networks Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018).

The mean of step s among t counts as s ^ (1 / share - 1), the polynomial decay of Shamir and Zhang (ICML 2013): its age is about
`share` of the steps so far, whatever the job's length, which need not be known. It begins anew where the learning rate
drops abruptly or rises (`RateWatch`), since what was before is then no longer where the block is going, and where blocks
thaw.

A block whose weights were written to meanwhile (re-initialised, loaded) has no such point: between two networks lies nothing
good. The distance from the weights to the mean tells, which is much the same from sample to sample and leaps then; such a block
is left as it is until this is forgotten.

It covers parameters, and the running statistics of normalisation layers, which belong to them; other buffers (vectors of a
spectral norm, codes, counters) stay as they are. Half-precision weights have a mean in fp32: small steps would be lost. It
costs the memory of one more copy of the weights that may yet freeze, and one pass over them every ten steps or less often.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from kgt_ddp.blocks import Block, Blocks
from kgt_ddp.policies.learning_rate import RateWatch

logger = logging.getLogger(__name__)

FEWEST_STEPS: Final = 10
"""From one sample of the weights to the next."""
SAMPLES: Final = 20
"""In a stretch of `share` of the steps so far, where that leaves more steps between them."""
REMEMBERED: Final = 64
"""Samples whose distance to the mean is remembered: three times the mean's age."""
LEAP: Final = 4.0
"""Times the median distance. Of a ResNet's blocks under a high rate none was above 2.3; one drawn afresh was at 16 and more."""
STATISTICS: Final = ("running_mean", "running_var")
AT_ONCE: Final = 32 << 20
"""Bytes of weights whose distances are computed together: few calls for small blocks, little memory for large ones."""


class WeightMean:
    """See the module docstring.

    Args:
        blocks: the partition; those behind its frontier are followed.
        share: age of the mean over the steps so far, above 0 and below 1.
    """

    def __init__(self, blocks: Blocks, share: float) -> None:
        self._blocks = blocks
        self._share = share
        self._means: dict[str, Tensor] = {}
        self._step = 0
        """Of the last sample."""
        self._mass = 0.0
        """What the weights of all samples sum up to; they are scaled to sum up to one."""
        self._distances: dict[str, deque[list[Tensor]]] = defaultdict(_distances)
        """By block, a row a sample, with a norm for each of its weights. On the weights' device: read only when a block
        freezes, so that no sample waits for it."""
        self._places: dict[str, tuple[nn.Module, str]] = {}
        """Module and attribute of what `_followed` finds, as long as the frontier is `_placed_at`."""
        self._placed_at: int | None = None
        self._rate = RateWatch()

    def note(self, step: int, rate: Callable[[], float | None]) -> None:
        """`step` optimizer steps are finished: take a sample, if one is due. `rate` is asked for the learning rate then."""
        if step - self._step < max(FEWEST_STEPS, int(self._share * step / SAMPLES)):
            return
        if self._rate.note(step, rate()) is not None:
            self.begin_anew()
        self._sample(step)

    def begin_anew(self) -> None:
        """What was seen so far counts no more."""
        self._means, self._mass = {}, 0.0
        self._distances.clear()

    @torch.no_grad()
    def moved_from(self, old: int, *, put: bool = True) -> list[nn.Parameter]:
        """The frontier has moved, it was `old`. What froze is put to its mean, unless `put` is false, and the mean is given
        up; a block whose weights leapt, or were not finite, stays as it is. Where blocks thawed, all means begin anew.

        Returns:
            The parameters that froze, written or not: the same on all ranks.
        """
        if self._blocks.frontier < old:
            self.begin_anew()
            return []
        still = self._blocks.tensors_at(old)
        froze = {name: t for name, t in self._blocks.tensors_at(self._blocks.frontier).items() if name not in still}
        for block in self._blocks.blocks[: self._blocks.frontier]:
            distances = _lengths(self._distances.pop(block.name, ()))
            means = {name: self._means.pop(name) for name in _names(block) if name in froze and name in self._means}
            if not put:
                continue
            if _steady(distances):
                for name, mean in means.items():
                    froze[name].copy_(mean)
            else:
                logger.info("%s freezes as it is: its weights were written to, or were not finite", block.name)
        return [tensor for tensor in froze.values() if put and isinstance(tensor, nn.Parameter)]

    def state_dict(self) -> dict[str, Any]:
        """Numbers and CPU tensors."""
        return {
            "step": self._step,
            "mass": self._mass,
            "rate": self._rate.state_dict(),
            "means": {name: mean.to("cpu", copy=True) for name, mean in self._means.items()},
            "distances": {name: _lengths(rows) for name, rows in self._distances.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with what of it may still freeze."""
        self._step, self._mass = state["step"], state["mass"]
        self._rate.load_state_dict(state["rate"])
        present = self._followed()
        self._means = {
            name: mean.to(present[name].device, copy=True) for name, mean in state["means"].items() if name in present
        }
        self._distances.clear()
        for name, some in state["distances"].items():
            self._distances[name].extend([torch.tensor(one)] for one in some)

    @torch.no_grad()
    def _sample(self, step: int) -> None:
        kept = (self._step / step) ** (1.0 / self._share)
        self._mass = kept * self._mass + (1.0 - kept)
        present = self._followed()
        for blocks in self._portions(present):
            tensors = {name: _wide(present[name]) for block in blocks for name in _names(block) if name in present}
            known = [name for name, tensor in tensors.items() if _alike(self._means.get(name), tensor)]
            weights = [name for name in known if isinstance(present[name], nn.Parameter)]
            if weights:
                apart = torch._foreach_sub([self._means[n] for n in weights], [tensors[n] for n in weights])
                norms = dict(zip(weights, torch._foreach_norm(apart), strict=True))
                for block in blocks:
                    row = [norms[name] for name, _ in block.parameters if name in norms]
                    if row:
                        self._distances[block.name].append(row)
            if known:
                share = (1.0 - kept) / self._mass
                torch._foreach_lerp_([self._means[n] for n in known], [tensors[n] for n in known], share)
            self._means |= {name: tensor.clone() for name, tensor in tensors.items() if name not in known}
        self._step = step

    def _portions(self, present: Mapping[str, Tensor]) -> Iterator[list[Block]]:
        """The blocks that train, in runs of at most `AT_ONCE`, or of one block."""
        portion: list[Block] = []
        total = 0
        for block in self._blocks.blocks[self._blocks.frontier :]:
            num_bytes = sum(present[name].nbytes for name in _names(block) if name in present)
            if portion and total + num_bytes > AT_ONCE:
                yield portion
                portion, total = [], 0
            portion.append(block)
            total += num_bytes
        if portion:
            yield portion

    def _followed(self) -> dict[str, Tensor]:
        """What may freeze yet, and whose mean means something."""
        frontier = self._blocks.frontier
        if self._placed_at != frontier:
            still = self._blocks.tensors_at(frontier)
            self._places = {
                name: (self._blocks.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
                for name, tensor in self._blocks.tensors_at(self._blocks.max_frontier).items()
                if name not in still and (isinstance(tensor, nn.Parameter) or name.endswith(STATISTICS))
            }
            self._placed_at = frontier
        found = {name: getattr(module, attribute, None) for name, (module, attribute) in self._places.items()}
        return {
            name: tensor for name, tensor in found.items() if tensor is not None
        }  # a norm may give up its statistics


def _names(block: Block) -> list[str]:
    return [*(name for name, _ in block.parameters), *block.buffers]


def _distances() -> deque[list[Tensor]]:
    return deque(maxlen=REMEMBERED)


def _lengths(rows: Sequence[Sequence[Tensor]]) -> list[float]:
    """Norm of each row. A block may lie on several devices: all are read together from one of them."""
    if not rows:
        return []
    device = rows[0][0].device
    values = iter(torch.stack([norm.to(device) for row in rows for norm in row]).tolist())
    return [math.hypot(*itertools.islice(values, len(row))) for row in rows]


def _steady(distances: Sequence[float]) -> bool:
    """Has there been no leap among these?"""
    if not all(map(math.isfinite, distances)):
        return False
    return not distances or max(distances) <= LEAP * statistics.median(distances)


def _wide(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor if tensor.dtype == wide else tensor.to(wide)


def _alike(mean: Tensor | None, tensor: Tensor) -> bool:
    return mean is not None and mean.shape == tensor.shape and mean.device == tensor.device
