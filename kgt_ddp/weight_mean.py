"""The running mean of the weights of the blocks that still train: where a block is put as it freezes.

Under a high learning rate a block jitters about a point, and a falling rate would lead it there. A block that is frozen
before that stays where it happens to be; its mean over the last stretch of training is near that point (Polyak and Juditsky
1992; for networks Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI 2018).

The mean of step s among t counts as s ^ (1 / share - 1), the polynomial decay of Shamir and Zhang (ICML 2013): its age is about
`share` of the steps so far, whatever the job's length, which need not be known. It begins anew where the learning rate
drops abruptly or rises (`RateWatch`), since what was before is then no longer where the block is going, and where blocks
thaw.

It covers parameters, and the running statistics of normalisation layers, which belong to them; other buffers (vectors of a
spectral norm, codes, counters) stay as they are. Half-precision weights have a mean in fp32: small steps would be lost. It
costs the memory of one more copy of the weights that may yet freeze, and one pass over them every ten steps or less often.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from kgt_ddp.blocks import Blocks
from kgt_ddp.policies.learning_rate import RateWatch

logger = logging.getLogger(__name__)

FEWEST_STEPS: Final = 10
"""From one sample of the weights to the next."""
SAMPLES: Final = 20
"""In a stretch of `share` of the steps so far, where that leaves more steps between them."""
STATISTICS: Final = ("running_mean", "running_var")


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

    @torch.no_grad()
    def moved_from(self, old: int) -> list[nn.Parameter]:
        """The frontier has moved, it was `old`. What froze is put to its mean, which is given up; where a mean is not
        finite, everything stays as it is. Where blocks thawed, all means begin anew.

        Returns:
            The parameters that froze, written or not: the same on all ranks.
        """
        if self._blocks.frontier < old:
            self.begin_anew()
            return []
        still = self._blocks.tensors_at(old)
        froze = {name: t for name, t in self._blocks.tensors_at(self._blocks.frontier).items() if name not in still}
        means = {name: mean for name in froze if (mean := self._means.pop(name, None)) is not None}
        if all(bool(torch.isfinite(mean).all()) for mean in means.values()):
            for name, mean in means.items():
                froze[name].copy_(mean)
        else:
            logger.warning("weights were not finite lately: blocks freeze as they are, not at the mean of their weights")
        return [tensor for tensor in froze.values() if isinstance(tensor, nn.Parameter)]

    def state_dict(self) -> dict[str, Any]:
        """Numbers and CPU tensors."""
        return {
            "step": self._step,
            "mass": self._mass,
            "rate": self._rate.state_dict(),
            "means": {name: mean.to("cpu", copy=True) for name, mean in self._means.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with what of it may still freeze."""
        self._step, self._mass = state["step"], state["mass"]
        self._rate.load_state_dict(state["rate"])
        present = self._followed()
        self._means = {
            name: mean.to(present[name].device, copy=True) for name, mean in state["means"].items() if name in present
        }

    def _sample(self, step: int) -> None:
        kept = (self._step / step) ** (1.0 / self._share)
        self._mass = kept * self._mass + (1.0 - kept)
        present = self._followed()
        fresh = {name: tensor for name, tensor in present.items() if not _alike(self._means.get(name), tensor)}
        known = [name for name in present if name not in fresh]
        if known:
            means = [self._means[name] for name in known]
            torch._foreach_lerp_(means, [_wide(present[name]) for name in known], (1.0 - kept) / self._mass)
        self._means.update({name: _wide(tensor).clone() for name, tensor in fresh.items()})
        self._step = step

    def _followed(self) -> dict[str, Tensor]:
        """What may freeze yet, and whose mean means something."""
        still = self._blocks.tensors_at(self._blocks.frontier)
        return {
            name: tensor.detach()
            for name, tensor in self._blocks.tensors_at(self._blocks.max_frontier).items()
            if name not in still and (isinstance(tensor, nn.Parameter) or name.endswith(STATISTICS))
        }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _alike(mean: Tensor | None, tensor: Tensor) -> bool:
    return mean is not None and mean.shape == tensor.shape and mean.device == tensor.device
