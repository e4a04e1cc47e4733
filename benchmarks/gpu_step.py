"""What freezing and the cache save, and what the wrapper costs, in a step on one GPU (one rank, NCCL).

    python -m benchmarks.gpu_step [--quick] [--networks resnet20,resnet50,bert]

Networks: `resnet20`, the example's, 128 images of 1×28×28 in fp32 (its kernels are so small that the step is the host's);
`resnet50`, 64 images of 3×224×224 under bf16 autocast; `bert`, BERT-base, 32 texts of up to 128 tokens under bf16 autocast,
AdamW. Random weights and inputs. Inputs come from pinned memory in every step, as from a loader.

Cases, interleaved round by round in one process:

- `ddp`: stock DistributedDataParallel; `hook`: FreezeAwareDDP with policy none; `listening`: with policy kgt, which without a
  reference freezes nothing, but follows the mean of the weights;
- `hand_k`: stock DDP over a model whose first k blocks were frozen before wrapping; `frozen_k`: FreezeAwareDDP whose policy
  froze them;
- `cached_k`: the same with a full activation cache, every batch hits; `auto_k`: the same, the gate deciding.

k is a third, two thirds and five sixths of the blocks. Figures, for each network: `hook_over_ddp`, `listening_over_ddp`,
`frozen_over_hand_k`, `frozen_speedup_k` (ddp over frozen_k), `cached_speedup_k` (frozen_k over cached_k), `auto_speedup_k`,
`step_ms` of `ddp`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Figures, interleave, parser, ratios, seconds

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = {"resnet20": 16, "resnet50": 6, "bert": 6}
"""Of a sample."""
NETWORKS = ("resnet20", "resnet50", "bert")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def network(name: str, *, quick: bool) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet20":
        sys.path.insert(0, str(EXAMPLES))
        from resnet import resnet20

        return resnet20()
    import transformers

    if name == "resnet50":
        small: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 16, 16], "embedding_size": 16}
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**(small if quick else {})))
    small = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**(small if quick else {})))


def batches(name: str, *, quick: bool, count: int = 8) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    made: list[Batch] = []
    for _ in range(count):
        if name == "bert":
            size, longest = (4, 16) if quick else (32, 128)
            lengths = torch.randint(longest // 4, longest + 1, (size,), generator=g)
            lengths[0] = longest
            mask = (torch.arange(longest) < lengths[:, None]).long()
            ids = torch.randint(1000, 30000, mask.shape, generator=g) * mask
            made.append(({"input_ids": ids, "attention_mask": mask}, torch.randint(0, 2, (size,), generator=g)))
        elif name == "resnet50":
            size, side = (4, 32) if quick else (64, 224)
            x = torch.randn(size, 3, side, side, generator=g)
            made.append(({"pixel_values": x}, torch.randint(0, 2, (size,), generator=g)))
        else:
            size = 8 if quick else 128
            x = torch.randn(size, 1, 28, 28, generator=g)
            made.append(({"x": x}, torch.randint(0, 10, (size,), generator=g)))
    if DEVICE.type == "cuda":
        made = [({n: t.pin_memory() for n, t in inputs.items()}, labels.pin_memory()) for inputs, labels in made]
    return made


class Job:
    """One training job over a few batches that come again and again."""

    def __init__(self, name: str, ddp: nn.Module, data: list[Batch]) -> None:
        self.ddp: Any = ddp
        parameters = [p for p in ddp.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=1e-5)
            if name == "bert"
            else torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        )
        self._autocast = name != "resnet20"
        self._data = data
        self._at = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            inputs, labels = self._data[self._at % len(self._data)]
            self._at += 1
            inputs = {n: t.to(DEVICE, non_blocking=True) for n, t in inputs.items()}
            labels = labels.to(DEVICE, non_blocking=True)
            self.optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16) if self._autocast else nullcontext():
                output = self.ddp(**inputs)
                loss = nn.functional.cross_entropy(getattr(output, "logits", output), labels)
            loss.backward()
            self.optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()


def freeze_by_hand(model: nn.Module, names: set[str], modules: list[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    for name in modules:
        model.get_submodule(name).eval()
    return model


def jobs(name: str, *, quick: bool) -> tuple[dict[str, Job], tuple[int, ...]]:
    from kgt_ddp import FreezeAwareDDP

    data = batches(name, quick=quick)
    device_ids = [DEVICE.index or 0] if DEVICE.type == "cuda" else None

    def frozen(k: int, cache: str, policy: str = "") -> Job:
        os.environ["KGTRUN_CACHE"] = cache
        policy = policy or (f"static:blocks={k}" if k else "none")
        net = network(name, quick=quick).to(DEVICE)
        made = Job(name, FreezeAwareDDP(net, device_ids=device_ids, policy=policy, total_steps=1_000_000), data)
        made.run(1)
        while made.ddp.freezing.frontier != k:
            made.run(1)
        return made

    def stock(model: nn.Module) -> Job:
        return Job(name, DistributedDataParallel(model.to(DEVICE), device_ids=device_ids), data)

    made = {"ddp": stock(network(name, quick=quick)), "hook": frozen(0, "off")}
    made["listening"] = frozen(0, "off", "kgt")
    blocks = made["hook"].ddp.freezing.blocks
    names_of = {id(m): n for n, m in made["hook"].ddp.module.named_modules()}
    ks = tuple(sorted({max(1, round(len(blocks) * share)) for share in (1 / 3, 2 / 3, 5 / 6)}))
    for k in ks:
        front = blocks.blocks[:k]
        names = {n for b in front for n, _ in b.parameters}
        modules = [names_of[id(m)] for b in front for m in [*b.modules, *([b.unit] if b.unit is not None else [])]]
        made[f"hand_k{k}"] = stock(freeze_by_hand(network(name, quick=quick), names, modules))
        for case, cache in (("frozen", "off"), ("cached", "on"), ("auto", "auto")):
            made[f"{case}_k{k}"] = frozen(k, cache)
    for job in made.values():
        job.run(len(data))
    for k in ks:
        for case in ("cached", "auto"):
            for _ in range(3):  # written, read, and the gate has seen enough
                made[f"{case}_k{k}"].run(2 * len(data))
                made[f"{case}_k{k}"].ddp.freezing.cache.drain()
    return made, ks


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", default=",".join(NETWORKS), help=f"comma-separated of {', '.join(NETWORKS)}")
    options = made.parse_args()
    if DEVICE.type != "cuda" and not options.quick:
        made.error("no CUDA device; --quick runs on the CPU too, to show that it works")
    figures = Figures("gpu_step")
    with tempfile.TemporaryDirectory(prefix="kgtrun-bench-") as folder:
        os.environ.update(RANK="0", WORLD_SIZE="1", KGTRUN_CACHE_BYTES=str(8 << 30))
        os.environ["KGTRUN_CACHE_DIR"] = os.path.join(folder, "cache")
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name in options.networks.split(","):
            steps, rounds = (2, 2) if options.quick else (STEPS[name], 8)
            cases, ks = jobs(name, quick=options.quick)

            def timed(job: Job, steps: int = steps) -> Callable[[], float]:
                return lambda: seconds(lambda: job.run(steps))

            samples = interleave({case: timed(job) for case, job in cases.items()}, rounds=rounds)
            figures.exact(f"{name} step_ms", statistics.median(samples["ddp"]) / steps * 1e3)
            for case in ("hook", "listening"):
                figures.sampled(f"{name} {case}_over_ddp", ratios(samples[case], samples["ddp"]))
            for k in ks:
                figures.sampled(f"{name} frozen_over_hand_k{k}", ratios(samples[f"frozen_k{k}"], samples[f"hand_k{k}"]))
                figures.sampled(f"{name} frozen_speedup_k{k}", ratios(samples["ddp"], samples[f"frozen_k{k}"]))
                for case in ("cached", "auto"):
                    pairs = ratios(samples[f"frozen_k{k}"], samples[f"{case}_k{k}"])
                    figures.sampled(f"{name} {case}_speedup_k{k}", pairs)
            summaries = {
                case: job.ddp.freezing.cache.summary()
                for case, job in cases.items()
                if case.startswith(("cached", "auto"))
            }
            figures.fact(f"{name} caches", summaries)
            for job in cases.values():
                if hasattr(job.ddp, "freezing"):
                    job.ddp.freezing.close()
            del cases, job
            figures.publish(quick=options.quick)  # a lent machine may go before the last network is done
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
