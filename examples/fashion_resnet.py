"""Train a ResNet-20 on Fashion-MNIST with data-parallel ranks; at the end, say what freezing saved.

    kgtrun --nproc-per-node 2 --policy linear:start=0.25,stop=0.75,fraction=0.8 examples/fashion_resnet.py
    torchrun --nproc-per-node 2 examples/fashion_resnet.py          # the same script, nothing is frozen

An ordinary torchrun script: all that is kgtrun's is the class that wraps the model and the summary read from it.
The data comes from scripts/data, or from any folder with the four IDX files (--data, KGTRUN_FASHION_MNIST_DIR).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from resnet import resnet20
from run_report import frozen_so_far, report, tell_loss
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

MEAN, STD = 0.2860, 0.3530
DATA = Path(__file__).resolve().parents[1] / ".data" / "fashion-mnist"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="ResNet-20 on Fashion-MNIST under kgtrun or torchrun")
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("KGTRUN_FASHION_MNIST_DIR") or DATA, help="folder of the IDX files")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=128, help="global: each rank takes its share (default 128)")
    add("--train-images", type=int, default=20_000, help="at most 60000 (default 20000)")
    add("--test-images", type=int, default=10_000, help="for the final accuracy, at most 10000 (default all)")
    add("--val-images", type=int, default=2_000, help="test images looked at after each epoch (default 2000; 0: none)")
    add("--lr", type=float, default=0.1, help="peak learning rate, falls to 0 along a cosine (default 0.1)")
    add("--seed", type=int, default=0)
    add("--augment", action="store_true", help="flip images left to right at random")
    add("--stock-ddp", action="store_true", help="wrap with torch's DistributedDataParallel, for comparison")
    add("--json-out", type=Path, help="rank 0 writes the figures of the run here")
    return parser.parse_args()


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """An IDX file of unsigned bytes, gzipped or not, as a uint8 tensor of the shape it declares."""
    packed, plain = folder / f"{name}.gz", folder / name
    if not packed.exists() and not plain.exists():
        raise SystemExit(f"{folder} has no {packed.name} and no {name}: run scripts/data, or name a folder with --data")
    raw = bytearray(gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{name} in {folder} is not an IDX file of unsigned bytes")
    num_dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * num_dims).reshape(shape)


def load(folder: Path, split: str, count: int, device: torch.device) -> TensorDataset:
    """The first `count` images of a split, normalised, (count, 1, 28, 28), and their labels, in device memory."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte")
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte")
    if not 0 < count <= len(images):
        raise SystemExit(f"{count} images of {split!r} asked for; there are {len(images)}")
    pixels = (images[:count].to(device).float() / 255 - MEAN) / STD
    return TensorDataset(pixels.unsqueeze(1), labels[:count].to(device).long())


def flip_some(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored with probability one half."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, count: int) -> float:
    """Share of the first `count` samples classified rightly; each rank does its part, every rank gets the answer."""
    model.eval()
    images, labels = (t[:count][dist.get_rank() :: dist.get_world_size()] for t in data.tensors)
    right = torch.zeros((), device=images.device)
    for batch, wanted in zip(images.split(125), labels.split(125), strict=True):
        right += (model(batch).argmax(1) == wanted).sum()
    dist.all_reduce(right)
    model.train()
    return right.item() / count


def total_over_ranks(value: float, device: torch.device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def data_parallel(net: nn.Module, device: torch.device, *, total_steps: int, stock: bool) -> nn.Module:
    """The one place where this script knows of kgtrun."""
    device_ids = [device.index] if device.type == "cuda" else None
    if stock:
        return nn.parallel.DistributedDataParallel(net, device_ids=device_ids)
    from kgt_ddp import FreezeAwareDDP  # here, so that a run with --stock-ddp has nothing of ours in it

    return FreezeAwareDDP(net, device_ids=device_ids, total_steps=total_steps)


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train, print progress on rank 0, return the figures of the run."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world_size:
        raise SystemExit(f"--batch-size {args.batch_size} does not divide by {world_size} ranks")
    train_set = load(args.data, "train", args.train_images, device)
    test_set = load(args.data, "t10k", args.test_images, device)

    torch.manual_seed(args.seed)
    augmentation = torch.Generator().manual_seed(args.seed * 1000 + rank)
    sampler: DistributedSampler = DistributedSampler(train_set, seed=args.seed, drop_last=True)
    # The data set is a tensor, so a whole batch is one indexing operation; batch_size=None hands it through as it is.
    batches = BatchSampler(sampler, args.batch_size // world_size, drop_last=True)
    loader = DataLoader(train_set, sampler=batches, batch_size=None)
    total_steps = args.epochs * len(loader)

    net = resnet20().to(device)
    model = data_parallel(net, device, total_steps=total_steps, stock=args.stock_ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(total_steps, 1))

    num_val = min(args.val_images, args.test_images)
    epochs: list[dict[str, float]] = []
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        loss_sum = torch.zeros((), device=device)
        for images, labels in loader:
            if args.augment:
                images = flip_some(images, augmentation)
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach()
            tell_loss(model, loss)
        epochs.append({"loss": loss_sum.item() / len(loader)})
        line = f"epoch {epoch + 1}/{args.epochs}  loss {epochs[-1]['loss']:.4f}"
        if num_val:
            # On the bare network: ranks may have different numbers of batches here, and need not wait for each other.
            val_start_s, val_start_cpu_s = time.perf_counter(), time.process_time()
            epochs[-1]["accuracy"] = accuracy(net, test_set, num_val)
            epochs[-1]["val_wall_s"] = time.perf_counter() - val_start_s
            epochs[-1]["val_cpu_s"] = total_over_ranks(time.process_time() - val_start_cpu_s, device)
            line += f"  accuracy {epochs[-1]['accuracy']:.1%}"
        if rank == 0:
            print(f"{line}  {time.perf_counter() - start_s:.0f} s{frozen_so_far(model)}", flush=True)
    wall_s = time.perf_counter() - start_s
    cpu_s = total_over_ranks(time.process_time() - start_cpu_s, device)
    # The last validation may have been the whole test already.
    tested = num_val == args.test_images
    test_start_s, test_start_cpu_s = time.perf_counter(), time.process_time()
    test_accuracy = epochs[-1]["accuracy"] if tested else accuracy(net, test_set, args.test_images)
    test_cpu_s = total_over_ranks(time.process_time() - test_start_cpu_s, device)
    figures = {
        "accuracy": test_accuracy,
        "test_wall_s": time.perf_counter() - test_start_s,
        "test_cpu_s": test_cpu_s,
        "train_wall_s": wall_s,
        "train_cpu_s": cpu_s,
        "world_size": world_size,
        "steps": total_steps,
        "loss": epochs[-1]["loss"],
        "epochs": epochs,
    }
    if hasattr(model, "freezing"):
        figures["freezing"] = model.freezing.summary()
    return figures


def main() -> None:
    args = parse_args()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        figures = train(args, device)
        if dist.get_rank() == 0:
            print(report(figures), flush=True)
            if args.json_out:
                args.json_out.write_text(json.dumps({**figures, "seed": args.seed}) + "\n")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
