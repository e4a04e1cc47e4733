"""A trainer that asks what it was given, and a DDP that forwards attributes.    torchrun isinstance_and_subclass.py"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class ForwardingDDP(DistributedDataParallel):
    """Lets callers reach methods of the wrapped module."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, 1)

    def forward(self, x):
        return self.head(self.body(x))

    def l2(self):
        return sum(p.pow(2).sum() for p in self.parameters()).item()


def unwrap(model):
    if isinstance(model, DistributedDataParallel):
        return model.module
    return model


def fit(model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    stock, forwarding = DistributedDataParallel(Net()), ForwardingDDP(Net())
    assert type(forwarding) is ForwardingDDP
    assert isinstance(stock, DistributedDataParallel)
    losses = [*fit(stock, 12), *fit(forwarding, 6)]
    if dist.get_rank() == 0:
        fresh = Net()
        fresh.load_state_dict(unwrap(stock).state_dict())
        state = {"stock": unwrap(stock).state_dict(), "forwarding": unwrap(forwarding).state_dict()}
        torch.save(
            {"model": state, "losses": [*losses, forwarding.l2(), fresh.l2()]}, os.environ.get("OUTPUT", "out.pt")
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
