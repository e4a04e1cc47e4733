"""One host of `benchmarks.scaling`: profiles its steps without communication, then times them with it.

    scaling_worker.py DIRECTORY MODELS KS STEPS LINKS    under kgtrun, one rank on each host

Cases are the models, each with each number of frozen blocks in KS. A case is profiled twice: under the wrapper that is
measured later, alone in its process group, and as the bare network (what the model's first version took).

For each name in LINKS rank 0 makes the file `ready-NAME` and waits for `go-NAME`: meanwhile the links are set. Every rank
takes part in every phase, so that hosts that share cores disturb each other in the profile as they do in the measurement.
At the end rank 0 writes `found.json`: profiles by case (model and number of frozen blocks), and by link and case the step
times and the bytes that the hook counted and the interface sent; what an all_reduce costs by size; whose weights were used.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.scaling_model import Row, slowest

MORE_STEPS = {"resnet": 6}
"""A short step is measured more often: eight of them would be a single second of this machine's life."""
ALL_REDUCE_BYTES = (4, 8 << 20)
COUNTERS = Path("/sys/class/net/eth0/statistics/tx_bytes")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Batch = Callable[[nn.Module], torch.Tensor]


def resnet() -> tuple[nn.Module, Batch]:
    """ResNet-20 of the examples, 32 images of 28x28."""
    from resnet import resnet20

    images, labels = torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))
    return resnet20(), lambda model: nn.functional.cross_entropy(model(images), labels)


def language_folder() -> Path | None:
    """Where `scripts/data language` or KGTRUN_LANGUAGE_DIR has put MiniLM's weights, if it has."""
    from minilm_newsgroups import DATA, MODEL

    folder = Path(os.environ.get("KGTRUN_LANGUAGE_DIR") or DATA)
    return folder if (folder / MODEL).is_dir() else None


def minilm() -> tuple[nn.Module, Batch]:
    """MiniLM in its shape of 12 layers (33.2 million parameters) with the head of the example, 4 texts of 32 tokens.

    Of all-MiniLM-L6-v2, with its six layers twice (as Gong et al., "Efficient training of BERT by progressively stacking",
    2019, begin a deeper network); without its weights, random ones: times do not depend on them.
    """
    from minilm_newsgroups import NUM_CLASSES, MeanPooledClassifier, classifier
    from transformers import BertConfig, BertModel

    folder = language_folder()
    if folder is not None:
        net = classifier(folder)
        layers = net.encoder.encoder.layer
        layers.extend(copy.deepcopy(layer) for layer in list(layers))
    else:
        config = BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
        net = MeanPooledClassifier(BertModel(config, add_pooling_layer=False), config.hidden_size, NUM_CLASSES)
    tokens, labels = torch.randint(0, net.encoder.config.vocab_size, (4, 32)), torch.randint(0, NUM_CLASSES, (4,))
    mask = torch.ones_like(tokens)
    return net.train(), lambda model: nn.functional.cross_entropy(model(tokens, mask), labels)


def transformer() -> tuple[nn.Module, Batch]:
    """A small encoder of 8 layers (6.3 million parameters), for the quick run."""
    layers = [nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0) for _ in range(8)]
    x = torch.randn(4, 32, 256)
    return nn.Sequential(*layers), lambda model: model(x).square().mean()


MODELS = {"resnet": resnet, "minilm": minilm, "transformer": transformer}


def freeze_aware(name: str, frozen: int, group: dist.ProcessGroup | None) -> tuple[Any, Batch]:
    """The model under FreezeAwareDDP over `group` with its first `frozen` blocks frozen by the policy."""
    from kgt_ddp import FreezeAwareDDP

    torch.manual_seed(0)
    model, loss = MODELS[name]()
    policy = f"static:blocks={frozen}" if frozen else "none"
    return FreezeAwareDDP(model, policy=policy, process_group=group), loss


def step(model: nn.Module, loss: Batch, optimizer: torch.optim.Optimizer) -> tuple[float, float, float]:
    """Moments at which forward, backward and optimizer ended."""
    optimizer.zero_grad()
    value = loss(model)
    forward_s = time.perf_counter()
    value.backward()
    backward_s = time.perf_counter()
    optimizer.step()
    return forward_s, backward_s, time.perf_counter()


def twin(name: str, module: nn.Module) -> nn.Module:
    """The same network without a wrapper or hooks, frozen and in eval mode where `module` is."""
    model, _ = MODELS[name]()
    for ours, theirs in zip(model.modules(), module.modules(), strict=True):
        ours.training = theirs.training
    for p, q in zip(model.parameters(), module.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    return model


def steps_without_network(model: nn.Module, loss: Batch, steps: int) -> list[Row]:
    """Steps of a network that waits for no other host, begun together on all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    ready: dict[int, float] = {}
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda _, i=index: ready.__setitem__(i, time.perf_counter()))
        for index, parameter in enumerate(trained(model))
    ]
    rows = []
    for index in range(steps + 1):
        dist.barrier()
        begun = time.perf_counter()
        forward_s, backward_s, end_s = step(model, loss, optimizer)
        if index:
            moments = tuple(ready[i] - forward_s for i in range(len(handles)))
            spent = {"forward_s": forward_s - begun, "backward_s": backward_s - forward_s}
            rows.append(Row(**spent, optimizer_s=end_s - backward_s, ready_s=moments))
    for handle in handles:
        handle.remove()
    return rows


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def profile(model: nn.Module, rows: Sequence[Row]) -> dict[str, Any]:
    """Fields of a `Profile`: medians over steps."""
    gradients = [
        (statistics.median(row.ready_s[i] for row in rows), p.numel() * p.element_size())
        for i, p in enumerate(trained(model))
    ]
    names = ("forward_s", "backward_s", "optimizer_s")
    medians = {name: statistics.median(getattr(row, name) for row in rows) for name in names}
    return {**medians, "gradients": sorted(gradients)}


def broadcasts(ddp: Any) -> list[int]:
    """Bytes of each broadcast with which DDP makes buffers equal before a forward."""
    sizes: dict[torch.dtype, int] = {}
    for buffer in ddp.modules_buffers:
        sizes[buffer.dtype] = sizes.get(buffer.dtype, 0) + buffer.nbytes
    return list(sizes.values())


def profiles_of(case: Case, steps: int, alone: dist.ProcessGroup) -> dict[str, Any]:
    """The case under its wrapper, the slowest host of each step, and the bare network of rank 0."""
    wrapped = Case(case.name, case.frozen, alone)
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, steps_without_network(wrapped.ddp, wrapped.loss, steps * case.more))
    bare = twin(case.name, case.ddp.module)
    return {
        "wrapped": {**profile(wrapped.ddp, slowest(hosts)), "broadcasts": broadcasts(case.ddp)},
        "bare": profile(bare, steps_without_network(bare, case.loss, steps * case.more)),
    }


def measure(ddp: Any, loss: Batch, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """Steps with communication: their times, the bytes counted by the hook, the bytes that left the host."""
    seconds = []
    hook = ddp.freezing.hook
    counted, sent = sum(hook.reduced_bytes), int(COUNTERS.read_text())
    for _ in range(steps):
        begun = time.perf_counter()
        end_s = step(ddp, loss, optimizer)[2]
        seconds.append(end_s - begun)
    dist.barrier()
    return {
        "step_s": seconds,
        "hook_bytes": sum(hook.reduced_bytes) - counted,
        "wire_bytes": int(COUNTERS.read_text()) - sent,
    }


def all_reduce_seconds(num_bytes: int, repeats: int) -> float:
    tensor, seconds = torch.ones(num_bytes // 4), []
    for _ in range(repeats + 1):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


class Case:
    """One model with some blocks frozen, ready to be measured again and again."""

    def __init__(self, name: str, frozen: int, group: dist.ProcessGroup | None = None) -> None:
        self.name, self.frozen, self.key = name, frozen, f"{name} {frozen}"
        self.more = MORE_STEPS.get(name, 1)
        self.ddp, self.loss = freeze_aware(name, frozen, group)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(6):  # learns the order of blocks, rebuilds buckets, freezes
            step(self.ddp, self.loss, self.optimizer)
        frontier = self.ddp.freezing.frontier
        assert frontier == frozen, f"{frontier} blocks are frozen, not {frozen}"


def wait_for(path: Path, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} did not come")
        time.sleep(0.02)


def main() -> None:
    directory, models, ks = Path(sys.argv[1]), sys.argv[2].split(","), [int(k) for k in sys.argv[3].split(",")]
    steps, names = int(sys.argv[4]), sys.argv[5].split(",")
    sys.path.insert(0, str(EXAMPLES))  # scripts, which import each other as such
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    cases = [Case(name, frozen) for name in models for frozen in ks]
    profiles = {case.key: profiles_of(case, steps, alone) for case in cases}
    links: dict[str, Any] = {}
    for link in names:
        if dist.get_rank() == 0:
            (directory / f"ready-{link}").touch()
            wait_for(directory / f"go-{link}")
        dist.barrier()
        links[link] = {"all_reduce_s": {size: all_reduce_seconds(size, 5) for size in ALL_REDUCE_BYTES}}
        for case in cases:
            links[link][case.key] = measure(case.ddp, case.loss, case.optimizer, steps * case.more)
    if dist.get_rank() == 0:
        weights = "none" if "minilm" not in models else "pretrained" if language_folder() else "random"
        (directory / "found.json").write_text(json.dumps({"profiles": profiles, "links": links, "weights": weights}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
