"""Predicts the time of a training step on many nodes from what one node does and how fast the link is. Pure numbers.

A step is forward, backward, optimizer. Before the forward DDP makes buffers equal, one broadcast a type, which the forward
waits for. While the backward runs, gradients become ready parameter by parameter; DDP packs them into buckets in that
order (1 MiB first, then 25 MiB) and reduces one bucket after the other. A ring all_reduce of b bytes over n nodes moves
2 (n-1)/n b bytes out of each node in 2 (n-1) messages (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms",
2009); a broadcast goes down a tree of ceil(log2 n) hops. So

    reduce(b)    = 2 (n-1) latency + 2 (n-1)/n b (1/link + 1/node)
    broadcast(b) = ceil(log2 n) (latency + b (1/link + 1/node))

where `link` is the link's rate without frame and header bytes and `node` is what the node's own adding and copying allows,
measured without a limit on the link. The two add up, because a chunk is added before it is sent on. A node computes on
one core, so its adding and copying also delays the backward that runs meanwhile. The step ends when both the backward
and the last reduce have ended, then the optimizer runs:

    step = broadcasts + forward + max(backward + adding and copying, end of the last reduce) + optimizer

What a node does is measured, not fitted. The profile is that of a step under the same wrapper alone in its process group:
packing buckets, hooks and bookkeeping are a fixed cost of each step, 10 ms of the ResNet's 50 and 100. And it is that of
the host which came last in each step (`slowest`), because all wait for it in the reduce: with three hosts on two cores two
share one, and the step takes what those two take, not the mean.

Not modelled: congestion between nodes (the switch is taken to be non-blocking), cores to spare, and that the slowest of
more hosts than were profiled is slower still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20
"""DDP's defaults."""

PAYLOAD_OF_FRAME = 1448 / 1514
"""TCP payload in an Ethernet frame of 1,514 bytes with timestamps."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured step of one host, without communication; seconds."""

    forward_s: float
    backward_s: float
    optimizer_s: float
    ready_s: tuple[float, ...]
    """When each gradient was ready, from the start of the backward, in one order on all hosts."""

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.optimizer_s


def slowest(hosts: Sequence[Sequence[Row]]) -> list[Row]:
    """Of each step the row of the host that took longest; `hosts` hold the same steps, begun together."""
    return [max(rows, key=lambda row: row.step_s) for rows in zip(*hosts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One node's step without any communication."""

    forward_s: float
    backward_s: float
    optimizer_s: float
    gradients: tuple[tuple[float, int], ...]
    """(moment in the backward at which it is ready in seconds, bytes) of each gradient, in order of readiness; buckets
    in place of gradients give the same."""
    broadcasts: tuple[int, ...] = ()
    """Bytes of each broadcast of buffers before the forward."""

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.optimizer_s

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.gradients)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What connects the nodes."""

    link_bytes_per_s: float
    """Payload; infinite for a link without a limit."""
    node_bytes_per_s: float
    """What a node can push through its own reducing and copying."""
    latency_s: float

    @classmethod
    def of_link(cls, bits_per_s: float, *, node_bytes_per_s: float, latency_s: float) -> Network:
        """A link by its nominal rate."""
        return cls(
            link_bytes_per_s=bits_per_s / 8 * PAYLOAD_OF_FRAME, node_bytes_per_s=node_bytes_per_s, latency_s=latency_s
        )


def buckets(gradients: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """(moment at which it is full, bytes) of each of DDP's buckets."""
    found: list[tuple[float, int]] = []
    moment_s, size, limit = 0.0, 0, FIRST_BUCKET_BYTES
    for ready_s, num_bytes in gradients:
        moment_s, size = max(moment_s, ready_s), size + num_bytes
        if size >= limit:
            found.append((moment_s, size))
            size, limit = 0, BUCKET_BYTES
    return [*found, (moment_s, size)] if size else found


def reduce_seconds(num_bytes: int, nodes: int, network: Network) -> float:
    """One ring all_reduce."""
    if nodes == 1:
        return 0.0
    moved = 2 * (nodes - 1) / nodes * num_bytes
    return (
        2 * (nodes - 1) * network.latency_s + moved / network.link_bytes_per_s + copy_seconds(num_bytes, nodes, network)
    )


def copy_seconds(num_bytes: int, nodes: int, network: Network) -> float:
    """The part of one all_reduce that keeps a core busy."""
    return 2 * (nodes - 1) / nodes * num_bytes / network.node_bytes_per_s


def broadcast_seconds(num_bytes: int, nodes: int, network: Network) -> float:
    """One broadcast down a binomial tree."""
    hops = math.ceil(math.log2(nodes))
    return hops * (network.latency_s + num_bytes / network.link_bytes_per_s + num_bytes / network.node_bytes_per_s)


def step_seconds(profile: Profile, nodes: int, network: Network) -> float:
    """Predicted time of one step."""
    end_s = late_s = 0.0
    for ready_s, num_bytes in buckets(profile.gradients):
        end_s = max(end_s, ready_s + late_s) + reduce_seconds(num_bytes, nodes, network)
        late_s += copy_seconds(num_bytes, nodes, network)
    equal_s = sum(broadcast_seconds(num_bytes, nodes, network) for num_bytes in profile.broadcasts)
    return equal_s + profile.forward_s + max(profile.backward_s + late_s, end_s) + profile.optimizer_s


def speedup(plain: Profile, frozen: Profile, nodes: int, network: Network) -> float:
    """How many times faster a step is with blocks frozen."""
    return step_seconds(plain, nodes, network) / step_seconds(frozen, nodes, network)
