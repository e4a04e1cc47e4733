"""kgtrun --nproc-per-node 2 --policy linear examples/quickstart.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kgt_ddp import FreezeAwareDDP

EPOCHS = 8
dist.init_process_group("gloo")
torch.manual_seed(0)
inputs = torch.randn(8192, 32)
labels = (inputs @ torch.randn(32, 10)).argmax(1)  # a rule to be learned
data = TensorDataset(inputs, labels)
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=64, sampler=sampler)

sizes = [32, 128, 128, 128, 128, 10]
layers = [nn.Sequential(nn.Linear(n, m), nn.ReLU()) for n, m in zip(sizes[:-2], sizes[1:-1], strict=True)]
model = FreezeAwareDDP(nn.Sequential(*layers, nn.Linear(128, 10)), total_steps=EPOCHS * len(loader))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}, {model.freezing.summary()['frontier']} blocks frozen")
if dist.get_rank() == 0:
    print(model.freezing.describe())
dist.destroy_process_group()
