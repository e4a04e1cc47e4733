"""What the activation cache saves in a step, and what it costs where it cannot help.

Cases of one process, interleaved round by round, for the first k of a ResNet-20's 10 blocks frozen by FreezeAwareDDP:

- `uncached_k`: the frozen prefix runs in every step;
- `cached_k`: the cache is full, every batch hits; `prefetch_k`: the same, read ahead on a thread;
- `ideal_k`: the suffix trains on features that lie in memory as tensors, batch by batch: no hashing, no reading.

`bert_3` and `bert_5` are the same for a BERT of MiniLM's size (6 layers, width 384) on texts of mixed lengths, without
the ideal.

`second_epoch_hit_rate`: two ranks with a shuffling DistributedSampler on one folder, in the first epoch after the one
that wrote. `augmented_epoch_cost`: time of steps whose samples are always new (noise added), `auto`, over the uncached
ones, less 1, where an epoch had passed before the first block froze, as in jobs that start from unfrozen blocks: that the
samples never come again is known by then. `augmented_unseen_cost`: the same where blocks are frozen from the first step on,
so that all is hashed and written until an epoch and a half have shown that it was in vain.

Figures: `hit_over_ideal_k6` (goal <= 1.15), `hit_over_ideal_k3|k8`, `speedup_over_uncached_k3|k6|k8`,
`speedup_over_uncached_bert3|bert5`, `second_epoch_hit_rate` (goal >= 0.99), `augmented_epoch_cost` (goal <= 0.02),
`augmented_unseen_cost`, `read_mb_per_s`, `record_bytes_k6`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.harness import Figures, interleave, parser, ratios, seconds

KS = (3, 6, 8)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def network() -> nn.Module:
    sys.path.insert(0, str(EXAMPLES))
    from resnet import resnet20

    torch.manual_seed(0)
    return resnet20()


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=2000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def image_batches(count: int, batch: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        ({"x": torch.randn(batch, 1, 28, 28, generator=g)}, torch.randint(0, 10, (batch,), generator=g))
        for _ in range(count)
    ]


def text_batches(count: int, batch: int, longest: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        lengths = torch.randint(longest // 4, longest + 1, (batch,), generator=g)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(1, 2000, mask.shape, generator=g) * mask
        made.append(({"input_ids": ids, "attention_mask": mask}, torch.randint(0, 2, (batch,), generator=g)))
    return made


class Job:
    """A FreezeAwareDDP over a few batches that come again and again."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[tuple[dict[str, Any], torch.Tensor]],
        k: int,
        mode: str,
        *,
        change: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
        unfrozen_epoch: bool = False,
    ) -> None:
        from kgt_ddp import FreezeAwareDDP

        os.environ["KGTRUN_CACHE"] = mode
        # A part of an epoch more than one, for ranks agree on a mask some steps before it is applied.
        step = len(batches) + 4 if unfrozen_epoch else 0
        self.ddp: Any = FreezeAwareDDP(model, policy=f"static:blocks={k},step={step}", total_steps=100_000)
        self.optimizer = torch.optim.SGD(list(model.parameters()), lr=0.001, momentum=0.9)
        self.batches = batches
        self.change = change
        self.ahead = False
        self._at = 0
        if unfrozen_epoch:
            # Of real jobs it is not known how long an epoch is: they wait for more samples than these.
            self.cache.options = replace(self.cache.options, patience=sum(len(labels) for _, labels in batches))
        self.run(len(batches))
        while self.ddp.freezing.frontier != k:
            self.run(1)

    @property
    def cache(self) -> Any:
        return self.ddp.freezing.cache

    def fill(self) -> None:
        """Until every batch hits."""
        for _ in range(20):
            before = self.cache.counters.misses
            self.run(len(self.batches))
            self.cache.drain()
            if self.cache.counters.misses == before and self.cache.counters.hits:
                return
        raise SystemExit(f"the cache does not fill: {self.cache.summary()}")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            index = self._at % len(self.batches)
            inputs, labels = self.batches[index]
            self._at += 1
            if self.ahead:
                size = len(labels)
                coming = (index + 2) % len(self.batches)
                self.cache.expect(range(coming * size, coming * size + size))
                self.cache.comes(range(index * size, index * size + size))
            self.optimizer.zero_grad()
            output = self.ddp(**self.change(inputs))
            nn.functional.cross_entropy(getattr(output, "logits", output), labels).backward()
            self.optimizer.step()


def noisy(inputs: dict[str, Any]) -> dict[str, Any]:
    """As an augmentation does, so that no sample is the same twice."""
    return {"x": inputs["x"] + 1e-3 * torch.randn_like(inputs["x"])}


class Ideal:
    """The suffix of the ResNet under DDP, on features in memory."""

    def __init__(self, model: nn.Module, batches: list[tuple[dict[str, Any], torch.Tensor]], k: int) -> None:
        units = [model.get_submodule(f"stage{s}.{b}") for s in (1, 2, 3) for b in range(3)]
        head = model.get_submodule("head")
        prefix, suffix = nn.Sequential(model.stem, *units[:k]).eval(), units[k:]  # type: ignore[arg-type]

        class Suffix(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.units, self.head = nn.Sequential(*suffix), head

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.units(x).mean(dim=(2, 3)))

        with torch.no_grad():
            self.batches = [(prefix(inputs["x"]).clone(), labels) for inputs, labels in batches]
        self.ddp = nn.parallel.DistributedDataParallel(Suffix().train())
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.001, momentum=0.9)
        self._at = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x, labels = self.batches[self._at % len(self.batches)]
            self._at += 1
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.ddp(x), labels).backward()
            self.optimizer.step()


def single(folder: str, *, quick: bool) -> dict[str, Any]:
    """The cases of one process."""
    size, count, steps, rounds = (16, 3, 3, 2) if quick else (64, 8, 8, 12)
    os.environ["KGTRUN_CACHE_DIR"] = folder
    images = image_batches(count, size)
    jobs: dict[str, Any] = {}
    for k in KS:
        jobs[f"ideal_k{k}"] = Ideal(network(), images, k)
        jobs[f"uncached_k{k}"] = Job(network(), images, k, "off")
        jobs[f"cached_k{k}"] = Job(network(), images, k, "on")
    jobs["prefetch_k6"] = Job(network(), images, 6, "on")
    jobs["prefetch_k6"].ahead = True
    for name, mode in (("seen", "auto"), ("unseen", "auto"), ("uncached", "off")):
        jobs[f"augmented_{name}"] = Job(network(), images, 6, mode, change=noisy, unfrozen_epoch=name == "seen")
    for layers in (3, 5):
        texts = text_batches(2 if quick else 6, 4 if quick else 16, 24 if quick else 96)
        jobs[f"uncached_bert{layers}"] = Job(bert(), texts, layers, "off")
        jobs[f"cached_bert{layers}"] = Job(bert(), texts, layers, "on")
    for name, job in jobs.items():
        if name.startswith(("cached", "prefetch")):
            job.fill()

    def timed(job: Any) -> Callable[[], float]:
        return lambda: seconds(lambda: job.run(steps))

    samples = interleave({n: timed(job) for n, job in jobs.items()}, rounds=rounds)
    totals = {n: job.cache.summary() for n, job in jobs.items() if isinstance(job, Job)}
    for job in jobs.values():
        if isinstance(job, Job):
            job.ddp.freezing.close()
    return {"samples": samples, "totals": totals, "batch": size, "steps": steps}


def shuffled_rank(rank: int, world: int, store: str, folder: str, samples: int, pipe: Any) -> None:
    """Hit rate of the first epoch behind the one that wrote."""
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), KGTRUN_CACHE_DIR=folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    job = Job(network(), image_batches(2, 16), 6, "on")
    job.run(4)  # the check of the first use and the opening of the file are behind it
    g = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(samples, 1, 28, 28, generator=g), torch.randint(0, 10, (samples,), generator=g))
    sampler: DistributedSampler[Any] = DistributedSampler(data, world, rank, shuffle=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        job.cache.drain()
        dist.barrier()
        hits, misses = job.cache.counters.hits, job.cache.counters.misses
        for x, y in DataLoader(data, 16, sampler=sampler):
            job.batches = [({"x": x}, y)]
            job.run(1)
    hits, misses = job.cache.counters.hits - hits, job.cache.counters.misses - misses
    if rank == 0:
        pipe.send(hits / (hits + misses))
    job.ddp.freezing.close()
    dist.destroy_process_group()


def second_epoch_hit_rate(folder: str, samples: int) -> float:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as place:
        store = os.path.join(place, "store")
        ranks = [
            context.Process(target=shuffled_rank, args=(r, 2, store, folder, samples, theirs), daemon=True)
            for r in range(2)
        ]
        for rank in ranks:
            rank.start()
        try:
            if not ours.poll(300):
                raise SystemExit("the ranks of the shuffled epochs gave no answer in 300 s")
            return ours.recv()
        finally:
            for rank in ranks:
                rank.join(20)
                rank.kill()


def main() -> None:
    options = parser(__doc__).parse_args()
    figures = Figures("cache_step")
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kgtrun-bench-") as folder:
        os.environ["KGTRUN_CACHE_BYTES"] = str(2 << 30)
        os.environ.update(RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        result = single(os.path.join(folder, "cache"), quick=options.quick)
        dist.destroy_process_group()
        samples, totals = result["samples"], result["totals"]
        for k in KS:
            figures.sampled(f"hit_over_ideal_k{k}", ratios(samples[f"cached_k{k}"], samples[f"ideal_k{k}"]))
        figures.sampled("prefetched_hit_over_ideal_k6", ratios(samples["prefetch_k6"], samples["ideal_k6"]))
        for k in KS:
            figures.sampled(f"speedup_over_uncached_k{k}", ratios(samples[f"uncached_k{k}"], samples[f"cached_k{k}"]))
        for layers in (3, 5):
            figures.sampled(
                f"speedup_over_uncached_bert{layers}",
                ratios(samples[f"uncached_bert{layers}"], samples[f"cached_bert{layers}"]),
            )
        assert result["totals"]["augmented_seen"]["state"] == "closed", "what the first epoch showed was not heeded"
        for figure, job in (("augmented_epoch_cost", "augmented_seen"), ("augmented_unseen_cost", "augmented_unseen")):
            cost = ratios(samples[job], samples["augmented_uncached"])
            figures.sampled(figure, [c - 1 for c in cost])
        full = totals["cached_k6"]
        figures.exact("read_mb_per_s", full["bytes_read"] / max(full["read_s"], 1e-9) / 1e6)
        figures.exact("record_bytes_k6", full["bytes_read"] // full["hits"])
        figures.fact("totals", totals)
        figures.fact("batch", result["batch"])
        figures.fact("steps_per_sample", result["steps"])
        rate = second_epoch_hit_rate(os.path.join(folder, "shuffled"), 256 if options.quick else 4096)
        figures.exact("second_epoch_hit_rate", rate)
    figures.fact("seconds", time.monotonic() - started)
    figures.publish(quick=options.quick)


if __name__ == "__main__":
    main()
